"""The steps of one turn, from all streams: those that go together are read, judged and run together.

Invariants: a step reaches its session in the order in which its stream sent it; what cannot be read as one of many is
handed to its own stream, which reads it alone, and so is all else of that stream. A step that follows another of its
session in the same turn may wait for the next turn, and goes with what arrives meanwhile.
"""

from collections.abc import Sequence
from itertools import compress, groupby
from weakref import WeakKeyDictionary

import numpy as np
from conveyor_proto.fingerprint import fingerprints
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.inputs import all_finite
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.flight import Offer
from conveyor_server.transport.result_wire import ResultWriter
from conveyor_server.transport.sinks import StepsSink, durable_seqs_of
from conveyor_server.transport.step_layout import STEP_TAG
from conveyor_server.transport.step_parts import FEW, Forms, Part, Sender, joined
from conveyor_server.transport.turns import TurnReader


class Intake:
    """Gathers messages that hold steps or frames until `flush` or `take`. Core thread only.

    Args:
        core: what drives the sessions.
        metrics: counts refusals.
        use_compiled: whole turns go to the compiled part first, which must be built.
    """

    def __init__(self, core: Core, metrics: Metrics, *, use_compiled: bool) -> None:
        self._core = core
        self._metrics = metrics
        self._senders: list[Sender] = []
        self._data: list[bytes] = []
        self._durable_seqs = durable_seqs_of(core)
        self._forms = Forms(core)
        self._writers: WeakKeyDictionary[Engine, ResultWriter] = WeakKeyDictionary()
        self._turns = TurnReader(core, self._forms, self.writer) if use_compiled else None
        core.after_removal(self._forms.forget)

    def __len__(self) -> int:
        return len(self._data)

    def writer(self, engine: Engine) -> ResultWriter:
        """What writes the results of an engine's model."""
        writer = self._writers.get(engine)
        if writer is None:
            writer = self._writers[engine] = ResultWriter(engine.spec.outputs, says_durable=self._core.says_durable)
        return writer

    def add(self, sender: Sender, data: bytes) -> None:
        """Takes a message that holds a step or a frame."""
        if not self._data:
            self._core.kick()
        self._senders.append(sender)
        self._data.append(data)

    def count(self, sender: Sender) -> int:
        """Messages of a sender that are here. Some 10 ns for each that is here of anyone."""
        return self._senders.count(sender)

    def put_back(self, sender: Sender, data: bytes) -> None:
        """Takes a message again, before those that have come since."""
        self._wait((sender,), (data,))

    def take(self) -> bool:
        """Gives the steps of a turn that is complete to their sessions: where nothing is before them, they run now.

        Returns:
            Whether there were some, and all are answered.
        """
        if not self._data:
            return False
        senders, data = self._taken()
        if self._turns is None:
            self._hand_out(senders, data, whole=True)
            return False
        return self._take_by(self._turns, senders, data)

    def flush(self, sender: Sender) -> None:
        """Gives a sender's steps to their sessions: it must call this before anything that comes after them."""
        if sender not in self._senders:
            return
        self._core.catch_up()
        senders, data = self._taken()
        mine = [other is sender for other in senders]
        others = [not one for one in mine]
        self._senders, self._data = list(compress(senders, others)), list(compress(data, others))
        self._hand_out(list(compress(senders, mine)), list(compress(data, mine)), whole=False)

    # ------------------------------------------------------------ within

    def _taken(self) -> tuple[list[Sender], list[bytes]]:
        senders, self._senders = self._senders, []
        data, self._data = self._data, []
        return senders, data

    def _take_by(self, turns: TurnReader, senders: list[Sender], data: list[bytes]) -> bool:
        """Gives a turn to the compiled part, and what is left of it to arrays; see `take`."""
        left = turns.take(senders, data)
        if left.later[0]:
            self._wait(*left.later)
        if left.rest[0]:
            self._hand_out(*left.rest, whole=left.whole)
        if not left.aside[0]:
            return not left.rest[0] and not self._data
        # What is set aside comes behind what its senders sent before it.
        waiting = set(self._senders)
        waits = [sender in waiting for sender in left.aside[0]]
        goes = [not one for one in waits]
        self._senders += compress(left.aside[0], waits)
        self._data += compress(left.aside[1], waits)
        self._hand_out(list(compress(left.aside[0], goes)), list(compress(left.aside[1], goes)), whole=False)
        return False

    def _wait(self, senders: Sequence[Sender], data: Sequence[bytes]) -> None:
        """Has messages wait for the next turn, before those that come in it."""
        self._senders = [*senders, *self._senders]
        self._data = [*data, *self._data]
        self._core.kick()

    def _hand_out(self, senders: list[Sender], data: list[bytes], *, whole: bool) -> None:
        """By arrays: steps by the hundred, frames by their streams."""
        parted = [message[0] == STEP_TAG for message in data]
        if all(parted):
            self._hand_out_steps(senders, data, whole=whole)
            return
        first = 0
        for steps, group in groupby(parted):
            part = slice(first, first + len(list(group)))
            alone = whole and part == slice(0, len(data))
            hand_out = self._hand_out_steps if steps else self._hand_out_frames
            hand_out(senders[part], data[part], whole=alone)
            first = part.stop

    def _hand_out_frames(self, senders: list[Sender], data: list[bytes], *, whole: bool) -> None:
        framers: dict[Sender, list[bytes]] = {}
        for sender, message in zip(senders, data, strict=True):
            framers.setdefault(sender, []).append(message)
        for framer, messages in framers.items():
            framer.take_frames(messages, whole=whole and len(framers) == 1)

    def _hand_out_steps(self, senders: list[Sender], data: list[bytes], *, whole: bool) -> None:
        if len(data) < FEW:
            for sender, message in zip(senders, data, strict=True):
                sender.step(message, whole=whole and len(data) == 1)
            return
        parts, alone = self._forms.read(senders, data)
        if len(parts) > 1:
            parts = [joined(group) for group in _together(parts)]
        loners = {senders[index] for index in alone}
        if len(parts) > 1:
            loners |= _torn(parts)
        # Of each model all that came. What goes alone is of other sessions, and has its turn after these.
        whole = whole and len({part.form.engine for part in parts}) == len(parts)
        for part in parts:
            alone += self._take_part(part, loners, senders, data, whole=whole)
        for index in sorted(alone):
            senders[index].step(data[index])

    def _take_part(
        self, part: Part, loners: set[Sender], senders: list[Sender], data: list[bytes], *, whole: bool
    ) -> list[int]:
        """Gives its steps to their sessions; returns the indices of those that must go alone."""
        alone: list[int] = []
        good = self._usable(part, loners)
        if good is not None:
            alone = part.index[~good].tolist()
            part = part.chosen(good)
            if not len(part.rows):
                return alone
        offer: Offer | None = None
        if whole:
            if len(set(part.rows.tolist())) == len(part.rows):
                offer = self._offer(part, distinct=True)
                if self._core.run_now(offer):
                    return alone
            else:
                later = self._run_first_of_each(part)
                if later is not None:
                    self._wait([senders[index] for index in later], [data[index] for index in later])
                    return alone
        if offer is None:
            offer = self._offer(part, distinct=len(set(part.rows.tolist())) == len(part.rows))
        refused = self._core.directory.offer(offer, self._core.now())
        return [*alone, *part.index[refused].tolist()] if len(refused) else alone

    def _run_first_of_each(self, part: Part) -> list[int] | None:
        """Runs the first step of each session at once; returns the indices of the others, to wait for the next turn.

        None: nothing has happened. More than go now do not wait: their sessions would not know of them.
        """
        first = np.zeros(len(part.rows), np.bool_)
        first[np.unique(part.rows, return_index=True)[1]] = True
        if 2 * np.count_nonzero(first) < len(first):
            return None
        if not self._core.run_now(self._offer(part.chosen(first), distinct=True)):
            return None
        later: list[int] = part.index[~first].tolist()
        return later

    def _usable(self, part: Part, loners: set[Sender]) -> NDArray[np.bool_] | None:
        """Which steps have finite numbers only and are of no sender that has one that goes alone; None: all."""
        good = ~part.of(loners) if loners else None
        if not part.form.engine.spec.allow_non_finite_inputs and not all(map(all_finite, part.inputs)):
            finite = np.ones(len(part.rows), np.bool_)
            for array in part.inputs:
                if array.dtype.kind == "f":
                    finite &= np.isfinite(array).reshape(len(finite), -1).all(axis=1)
            finite &= ~part.of([part.senders[number] for number in np.flatnonzero(~finite).tolist()])
            good = finite if good is None else good & finite
        return good

    def _offer(self, part: Part, *, distinct: bool) -> Offer:
        form, rows, (handles, seqs, acked_seqs) = part.form, part.rows, part.numbers
        layout = form.layout
        return Offer(
            form.engine,
            form.record,
            rows,
            rows,
            seqs,
            acked_seqs if layout.has_acked_seq else None,
            np.array([sender.number for sender in part.senders]),
            fingerprints(part.inputs)[:, np.newaxis],
            part.inputs,
            layout.length,
            1,
            distinct,
            layout.timeout_ms / 1e3 or self._core.directory.limits.step_timeout_s,
            StepsSink(
                part.senders,
                handles,
                seqs,
                rows,
                self._durable_seqs,
                self.writer(form.engine),
                self._metrics,
                part.labels,
                layout.label_sizes,
            ),
        )


def _together(parts: list[Part]) -> list[list[Part]]:
    """The parts by kind."""
    groups: dict[object, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.form.kind, []).append(part)
    return list(groups.values())


def _torn(parts: list[Part]) -> set[Sender]:
    """The senders that have steps in several parts, which would come out of order."""
    seen: set[Sender] = set()
    torn: set[Sender] = set()
    for part in parts:
        mine = set(part.senders)
        torn |= seen & mine
        seen |= mine
    return torn
