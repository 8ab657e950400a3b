"""The steps of one turn, from all streams: those that are alike are read, judged and run together.

Invariants: a step reaches its session in the order in which its stream sent it; what cannot be read as one of many is
handed to its own stream, which reads it alone.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.fingerprint import fingerprints
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.inputs import StepInputs, all_finite
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.convert import step_content
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.session import Session
from conveyor_server.transport.result_wire import ResultWriter
from conveyor_server.transport.sinks import Caller, StepsSink
from conveyor_server.transport.step_layout import StepLayout, find_layout

# Fewer steps than this are read one by one: arrays cost some 100 microseconds a turn, whatever is in them.
_FEW = 4
# Layouts that are remembered for messages of one size, and sizes: clients of one model send a handful.
_MOST_LAYOUTS = 8
_MOST_SIZES = 256


class Sender(Caller, Protocol):
    """A stream that sends steps.

    Attributes:
        number: of the stream.
        rows: the session table's row of each handle.
    """

    number: int
    rows: dict[int, int]

    def step(self, data: bytes) -> None:
        """Takes a step message alone."""


class _Form:
    """Steps of one layout, of one engine."""

    def __init__(self, layout: StepLayout, session: Session) -> None:
        self.layout = layout
        self.engine = session.engine
        self.record = session.record
        self.writer = ResultWriter(session.engine.spec.outputs)
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
        self._waiting: list[tuple[Sender, bytes]] = []
        self._forms: dict[int, list[_Form]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sender: Sender, data: bytes) -> None:
        """Takes a message that holds a step."""
        self._waiting.append((sender, data))

    def flush(self) -> None:
        """Gives all steps to their sessions. A sender must call this before anything that comes after its steps."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) < _FEW:
            for sender, data in waiting:
                sender.step(data)
            return
        sizes: dict[int, list[int]] = {}
        for index, (_, data) in enumerate(waiting):
            sizes.setdefault(len(data), []).append(index)
        alone: list[int] = []
        for size, indices in sizes.items():
            alone += indices if len(indices) < _FEW else self._of_one_size(size, indices, waiting)
        for index in sorted(alone):
            sender, data = waiting[index]
            sender.step(data)

    def _of_one_size(self, size: int, indices: list[int], waiting: Sequence[tuple[Sender, bytes]]) -> list[int]:
        """Takes what it can of the messages of one size; returns the indices of the others."""
        index = np.array(indices)
        messages = np.frombuffer(b"".join([waiting[i][1] for i in indices]), np.uint8).reshape(len(indices), size)
        alone: list[int] = []
        forms = self._forms.setdefault(size, [])
        if len(self._forms) > _MOST_SIZES:
            self._forms = {size: forms}
        for form in forms:
            index, messages = self._take(form, index, messages, waiting, alone)
            if not len(index):
                return alone
        new = self._new_form(*waiting[int(index[0])])
        if new is not None:
            forms.insert(0, new)
            del forms[_MOST_LAYOUTS:]
            index, _ = self._take(new, index, messages, waiting, alone)
        return [*alone, *map(int, index)]

    def _take(
        self,
        form: _Form,
        index: NDArray[np.int64],
        messages: NDArray[np.uint8],
        waiting: Sequence[tuple[Sender, bytes]],
        alone: list[int],
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Takes the messages of one form, those that must go alone by putting them there; returns the others."""
        like = form.layout.matches(messages)
        if not like.any():
            return index, messages
        mine = messages if like.all() else messages[like]
        senders = [waiting[i][0] for i in index[like].tolist()]
        handles = form.layout.handle.numbers(mine).tolist()
        rows = np.array([sender.rows.get(handle, -1) for sender, handle in zip(senders, handles, strict=True)])
        # The same form may be another model's, and a form of that is found, or made, for it.
        known = (rows >= 0) & (self._core.directory.table.record[rows] == form.record.number)
        if not known.all():
            like[np.flatnonzero(like)[~known]] = False
            mine, rows = messages[like], rows[known]
        if len(rows):
            alone += self._offer(form, index[like], mine, rows, waiting)
        return index[~like], messages[~like]

    def _new_form(self, sender: Sender, data: bytes) -> _Form | None:
        """The form of a message, if it can be used."""
        try:
            step = session_pb2.StreamRequest.FromString(data).step
        except ValueError:  # the sender's own reading says what is wrong
            return None
        row = sender.rows.get(step.handle)
        session = None if row is None else self._core.directory.table.sessions[row]
        if session is None:
            return None
        content = step_content(step.inputs, session.engine.spec, self._core.max_time_steps)
        if not isinstance(content, StepInputs) or content.length > session.engine.limits.quantum:
            return None
        layout = find_layout(data, step, session.engine.spec, content.length)
        return None if layout is None else _Form(layout, session)

    def _offer(
        self,
        form: _Form,
        index: NDArray[np.int64],
        messages: NDArray[np.uint8],
        rows: NDArray[np.int64],
        waiting: Sequence[tuple[Sender, bytes]],
    ) -> list[int]:
        """Offers messages of one form to their sessions; returns the indices of those that must go alone."""
        core, layout = self._core, form.layout
        inputs = layout.arrays(messages)
        others: list[int] = []
        if form.checked and not all(map(all_finite, inputs)):
            good = _finite_rows(inputs, len(rows))
            others = [int(i) for i in index[~good]]
            if len(others) == len(rows):
                return others
            index, messages, rows = index[good], messages[good], rows[good]
            inputs = [array[good] for array in inputs]
        senders = [waiting[i][0] for i in index.tolist()]
        handles = layout.handle.numbers(messages)
        seqs = layout.seq.numbers(messages)
        offer = Offer(
            form.engine,
            form.record,
            rows,
            seqs,
            layout.acked_seq.numbers(messages) if layout.acked_seq.stop else None,
            np.array([sender.number for sender in senders]),
            fingerprints(inputs)[:, np.newaxis],
            inputs,
            layout.length,
            1,
            layout.timeout_ms / 1e3 or core.directory.limits.step_timeout_s,
            StepsSink(senders, handles, seqs, form.writer, self._metrics),
        )
        refused = core.directory.offer(offer, core.now())
        return [*others, *map(int, index[refused])]


def _finite_rows(inputs: Sequence[Array], rows: int) -> NDArray[np.bool_]:
    good = np.ones(rows, np.bool_)
    for array in inputs:
        if array.dtype.kind == "f":
            good &= np.isfinite(array).reshape(rows, -1).all(axis=1)
    return good
