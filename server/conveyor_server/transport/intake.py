"""The steps of one turn, from all streams: those that are alike are read, judged and run together.

Invariants: a step reaches its session in the order in which its stream sent it; what cannot be read as one of many is
handed to its own stream, which reads it alone, and so is all else of that stream that does not go with it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.fingerprint import fingerprints
from conveyor_proto.v1 import session_pb2
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.inputs import StepInputs, all_finite
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import RECORD
from conveyor_server.transport.result_wire import ResultWriter
from conveyor_server.transport.sinks import Caller, StepsSink
from conveyor_server.transport.step_layout import StepLayout, find_layout

# Fewer steps than this are read one by one: arrays cost some 100 microseconds a turn, whatever is in them.
_FEW = 3
# Layouts that are remembered for messages of one size, and sizes: clients of one model send a handful.
_MOST_LAYOUTS = 8
_MOST_SIZES = 256


class Sender(Caller, Protocol):
    """A stream that sends steps.

    Attributes:
        number: of the stream.
        rows: the session table's row of each handle.
        handle: of its only session; -1: it has none, or several.
        row: that one's.
    """

    number: int
    rows: dict[int, int]
    handle: int
    row: int

    def step(self, data: bytes) -> None:
        """Takes a step message alone."""

    def take_frames(self, *, whole: bool = False) -> None:
        """Takes the frames that it has gathered; they are the `whole` of what came in this turn."""


class _Form:
    """Steps of one layout, of one engine."""

    def __init__(self, layout: StepLayout, session: Session, writer: ResultWriter) -> None:
        self.layout = layout
        self.engine = session.engine
        self.record = session.record
        self.writer = writer
        self.checked = not session.engine.spec.allow_non_finite_inputs


class Intake:
    """Gathers steps until `flush`. Core thread only.

    Args:
        core: what drives the sessions.
        metrics: counts refusals.
    """

    def __init__(self, core: Core, metrics: Metrics) -> None:
        self._core = core
        self._metrics = metrics
        self._senders: list[Sender] = []
        self._data: list[bytes] = []
        self._framers: list[Sender] = []
        # So many messages are all that the turn has.
        self._whole = 0
        self._forms: dict[int, list[_Form]] = {}
        self._writers: WeakKeyDictionary[Engine, ResultWriter] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._data) + len(self._framers)

    @property
    def steps(self) -> int:
        """Messages that hold a step."""
        return len(self._data)

    def writer(self, engine: Engine) -> ResultWriter:
        """What writes the results of an engine's model."""
        writer = self._writers.get(engine)
        if writer is None:
            writer = self._writers[engine] = ResultWriter(engine.spec.outputs)
        return writer

    def add(self, sender: Sender, data: bytes) -> None:
        """Takes a message that holds a step."""
        if not self._data:
            self._core.kick()
        self._senders.append(sender)
        self._data.append(data)

    def expect_frames(self, sender: Sender) -> None:
        """Has a sender take its frames with the others' steps. It sees to it that it has no steps here meanwhile."""
        self._framers.append(sender)

    def take(self) -> None:
        """Gives all steps of a turn that is complete to their sessions: what goes together can be run at once."""
        framers, messages = self._framers, len(self._data)
        if messages:
            self._whole = 0 if framers else messages
            self.flush()
            self._whole = 0
        elif len(framers) == 1:
            self._framers = []
            framers[0].take_frames(whole=True)
        else:
            self.flush()

    def flush(self) -> None:
        """Gives all steps to their sessions. A sender must call this before anything that comes after its steps."""
        framers, self._framers = self._framers, []
        for framer in framers:
            framer.take_frames()
        senders, self._senders = self._senders, []
        data, self._data = self._data, []
        if len(data) < _FEW:
            for sender, message in zip(senders, data, strict=True):
                sender.step(message)
            return
        alone: list[int] = []
        size = len(data[0])
        if all(len(message) == size for message in data):
            alone += self._of_one_size(_Part.of_messages(range(len(data)), senders, data), data)
        else:
            for indices in _by_size(senders, data, alone):
                if len(indices) < _FEW:
                    alone += indices
                    continue
                chosen = [data[index] for index in indices]
                part = _Part.of_messages(indices, [senders[index] for index in indices], chosen)
                alone += self._of_one_size(part, data)
        for index in sorted(alone):
            senders[index].step(data[index])

    def _of_one_size(self, part: "_Part", data: Sequence[bytes]) -> list[int]:
        """Takes what it can of the messages of one size; returns the indices of the others."""
        alone: list[int] = []
        size = part.messages.shape[1]
        forms = self._forms.setdefault(size, [])
        if len(self._forms) > _MOST_SIZES:
            self._forms = {size: forms}
        for form in forms:
            part = self._take(form, part, alone)
            if not part.senders:
                return alone
        first = int(part.index[0])
        new = self._new_form(part.senders[0], data[first])
        if new is not None:
            forms.insert(0, new)
            del forms[_MOST_LAYOUTS:]
            part = self._take(new, part, alone)
        return [*alone, *part.index.tolist()]

    def _take(self, form: _Form, part: "_Part", alone: list[int]) -> "_Part":
        """Takes the messages of one form, those that must go alone by putting them there; returns the others."""
        layout = form.layout
        heads = layout.heads(part.messages)
        like = layout.matches(heads)
        others = _NOTHING
        if like is not None:
            part, others = part.divided(like)
            if not part.senders:
                return others
            heads = heads[like]
        numbers = layout.numbers(heads)
        rows = np.array(
            [
                sender.row if sender.handle == handle else sender.rows.get(handle, -1)
                for sender, handle in zip(part.senders, numbers[0].tolist(), strict=True)
            ]
        )
        # The same form may be another model's, and a form of that is found, or made, for it. Row -1 has no model.
        known = self._core.directory.table.cells[rows, RECORD] == form.record.number
        if np.count_nonzero(known) < len(known):
            part, strangers = part.divided(known)
            heads, numbers, rows = heads[known], numbers[:, known], rows[known]
            others = others.joined(strangers)
        apart = part.apart_from(others)
        if apart is not None:
            part, torn = part.divided(apart)
            others, rest = others.divided(~others.of(torn.senders))
            heads, numbers, rows = heads[apart], numbers[:, apart], rows[apart]
            alone += [*torn.index.tolist(), *rest.index.tolist()]
        if len(rows):
            alone += self._offer(form, part, _Steps(heads, numbers, rows))
        return others

    def _new_form(self, sender: Sender, data: bytes) -> _Form | None:
        """The form of a message, if it can be used."""
        try:
            step = session_pb2.StreamRequest.FromString(data).step
        except DecodeError:  # the sender's own reading says what is wrong
            return None
        row = sender.rows.get(step.handle)
        session = None if row is None else self._core.directory.table.sessions[row]
        if session is None:
            return None
        content = session.engine.reader.read(step.inputs, self._core.max_time_steps)
        if not isinstance(content, StepInputs) or content.length > session.engine.limits.quantum:
            return None
        layout = find_layout(data, step, session.engine.spec, content.length)
        return None if layout is None else _Form(layout, session, self.writer(session.engine))

    def _offer(self, form: _Form, part: "_Part", steps: "_Steps") -> list[int]:
        """Offers messages of one form to their sessions; returns the indices of those that must go alone."""
        core, layout = self._core, form.layout
        inputs = layout.arrays(part.messages)
        others: list[int] = []
        if form.checked and not all(map(all_finite, inputs)):
            good = _finite_rows(inputs, len(steps.rows))
            good &= ~part.of([sender for sender, usable in zip(part.senders, good.tolist(), strict=True) if not usable])
            part, bad = part.divided(good)
            others = bad.index.tolist()
            if not part.senders:
                return others
            steps = _Steps(steps.heads[good], steps.numbers[:, good], steps.rows[good])
            inputs = [array[good] for array in inputs]
        rows, (handles, seqs, acked_seqs) = steps.rows, steps.numbers
        offer = Offer(
            form.engine,
            form.record,
            rows,
            rows,
            seqs,
            acked_seqs if layout.has_acked_seq else None,
            np.array([sender.number for sender in part.senders]),
            fingerprints(inputs)[:, np.newaxis],
            inputs,
            layout.length,
            1,
            len(set(rows.tolist())) == len(rows),
            layout.timeout_ms / 1e3 or core.directory.limits.step_timeout_s,
            StepsSink(
                part.senders, handles, seqs, form.writer, self._metrics, layout.labels(steps.heads), layout.label_sizes
            ),
        )
        if len(rows) == self._whole and core.run_now(offer):
            return others
        refused = core.directory.offer(offer, core.now())
        return [*others, *part.index[refused].tolist()] if len(refused) else others


class _Steps(NamedTuple):
    """What the heads of messages say.

    Attributes:
        heads: uint8 `[count, head]`, see StepLayout.
        numbers: int64 `[3, count]`: handle, seq and acked_seq.
        rows: int64 `[count]`, each one's row of the session table.
    """

    heads: NDArray[np.uint8]
    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(slots=True)
class _Part:
    """Messages of one size.

    Attributes:
        index: where each came in the turn.
        senders: of each.
        messages: uint8 `[count, size]`.
    """

    index: NDArray[np.int64]
    senders: list[Sender]
    messages: NDArray[np.uint8]

    @classmethod
    def of_messages(cls, indices: Sequence[int], senders: list[Sender], data: Sequence[bytes]) -> "_Part":
        """Messages of one size, the `indices` of the turn's."""
        return cls(np.array(indices), senders, np.frombuffer(b"".join(data), np.uint8).reshape(len(data), -1))

    def divided(self, chosen: NDArray[np.bool_]) -> tuple["_Part", "_Part"]:
        """Those chosen, and the others."""
        return self._where(chosen), self._where(~chosen)

    def joined(self, other: "_Part") -> "_Part":
        """Both, in the order in which they came."""
        if not self.senders:
            return other
        index = np.concatenate([self.index, other.index])
        order = np.argsort(index)
        senders = [*self.senders, *other.senders]
        messages = np.concatenate([self.messages, other.messages])
        return _Part(index[order], [senders[i] for i in order.tolist()], messages[order])

    def of(self, senders: Iterable[Sender]) -> NDArray[np.bool_]:
        """Which are of these senders."""
        wanted = set(senders)
        return np.array([sender in wanted for sender in self.senders], np.bool_)

    def apart_from(self, other: "_Part") -> NDArray[np.bool_] | None:
        """Which are of senders that have none in the other part; None: all."""
        if not other.senders or set(self.senders).isdisjoint(other.senders):
            return None
        return ~self.of(other.senders)

    def _where(self, chosen: NDArray[np.bool_]) -> "_Part":
        senders = [sender for sender, kept in zip(self.senders, chosen.tolist(), strict=True) if kept]
        return _Part(self.index[chosen], senders, self.messages[chosen])


_NOTHING = _Part(np.empty(0, np.int64), [], np.empty((0, 0), np.uint8))


def _by_size(senders: Sequence[Sender], data: Sequence[bytes], alone: list[int]) -> Iterable[list[int]]:
    """Indices of the messages, by their size; those of senders with several sizes are put into `alone`."""
    size_of: dict[Sender, int] = {}
    torn = {
        sender for sender, one in zip(senders, data, strict=True) if size_of.setdefault(sender, len(one)) != len(one)
    }
    found: dict[int, list[int]] = {}
    for index, (sender, one) in enumerate(zip(senders, data, strict=True)):
        if sender in torn:
            alone.append(index)
        else:
            found.setdefault(len(one), []).append(index)
    return found.values()


def _finite_rows(inputs: Sequence[Array], rows: int) -> NDArray[np.bool_]:
    good = np.ones(rows, np.bool_)
    for array in inputs:
        if array.dtype.kind == "f":
            good &= np.isfinite(array).reshape(rows, -1).all(axis=1)
    return good
