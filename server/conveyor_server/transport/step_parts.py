"""Step messages of one turn, read by the hundred: those of one form together, as arrays.

Invariant: a message that is read here says what protobuf would read in it, and names a session that its stream holds;
every other is left, to be read alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import session_pb2
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.inputs import StepInputs
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import RECORD
from conveyor_server.transport.sinks import Caller
from conveyor_server.transport.step_layout import StepLayout, find_layout

# Fewer messages of a size than this are read one by one, unless they go with others.
FEW = 3
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

    def step(self, data: bytes, *, whole: bool = False) -> None:
        """Takes a step message alone; it is the `whole` of what came in this turn."""

    def take_frames(self, messages: Sequence[bytes], *, whole: bool = False) -> None:
        """Takes messages that hold frames, alone; they are the `whole` of what came in this turn."""


class Form:
    """Steps of one layout, of one engine.

    Attributes:
        kind: equal for forms whose steps can go together.
    """

    def __init__(self, layout: StepLayout, session: Session) -> None:
        self.layout = layout
        self.engine = session.engine
        self.record = session.record
        self.kind = (session.record.number, layout.length, layout.timeout_ms, layout.has_acked_seq)


@dataclass(slots=True)
class Part:
    """Steps of one turn that go together.

    Attributes:
        form: of the first of them; of the others, one of the same kind.
        index: int64 `[count]`, where each came in the turn, ascending.
        senders: of each.
        rows: int64 `[count]`, their sessions' rows of the table.
        numbers: int64 `[3, count]`: handles, seqs and acked_seqs.
        inputs: one for each of ModelSpec.inputs: `[count, time, *shape]`, or `[count, *shape]` without time.
        labels: see StepLayout; None where they lie otherwise, or differ in size.
    """

    form: Form
    index: NDArray[np.int64]
    senders: list[Sender]
    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    inputs: Sequence[Array]
    labels: NDArray[np.uint8] | None

    def chosen(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Part":
        """Some of them, by a mask or by their numbers in order."""
        senders = [self.senders[number] for number in np.arange(len(self.senders))[chosen].tolist()]
        labels = None if self.labels is None else self.labels[chosen]
        inputs = [array[chosen] for array in self.inputs]
        return Part(self.form, self.index[chosen], senders, self.rows[chosen], self.numbers[:, chosen], inputs, labels)

    def of(self, senders: Iterable[Sender]) -> NDArray[np.bool_]:
        """Which are of these senders."""
        wanted = set(senders)
        return np.array([sender in wanted for sender in self.senders], np.bool_)


def joined(parts: Sequence[Part]) -> Part:
    """Parts of one kind as one, in the order in which they came."""
    if len(parts) == 1:
        return parts[0]
    whole = Part(
        parts[0].form,
        np.concatenate([part.index for part in parts]),
        [sender for part in parts for sender in part.senders],
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.numbers for part in parts], axis=1),
        [np.concatenate(arrays) for arrays in zip(*(part.inputs for part in parts), strict=True)],
        None,
    )
    return whole.chosen(np.argsort(whole.index))


class Forms:
    """The forms that messages have had. Core thread only.

    Args:
        core: knows the sessions.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._forms: dict[int, list[Form]] = {}

    def __len__(self) -> int:
        """Sizes of messages that are remembered."""
        return len(self._forms)

    def read(self, senders: list[Sender], data: list[bytes]) -> tuple[list[Part], list[int]]:
        """What can be read together, and the indices of the other messages."""
        parts: list[Part] = []
        size = len(data[0])
        if all(len(message) == size for message in data):
            left = self._of_one_size(_Raw.of_messages(range(len(data)), senders, data), data, parts)
            return parts, left
        alone: list[int] = []
        by_size: dict[int, list[int]] = {}
        for index, message in enumerate(data):
            by_size.setdefault(len(message), []).append(index)
        for indices in by_size.values():
            if len(by_size) > FEW and len(indices) < FEW:
                alone += indices
                continue
            raw = _Raw.of_messages(indices, [senders[i] for i in indices], [data[i] for i in indices])
            alone += self._of_one_size(raw, data, parts)
        return parts, alone

    def _of_one_size(self, raw: "_Raw", data: Sequence[bytes], parts: list[Part]) -> list[int]:
        """Reads what it can of messages of one size into `parts`; returns the indices of the others."""
        size = raw.messages.shape[1]
        forms = self._forms.setdefault(size, [])
        if len(self._forms) > _MOST_SIZES:
            self._forms = {size: forms}
        for form in forms:
            raw = self._match(form, raw, parts)
            if not raw.senders:
                return []
        new = self.new(raw.senders[0], data[int(raw.index[0])])
        if new is not None:
            forms.insert(0, new)
            del forms[_MOST_LAYOUTS:]
            raw = self._match(new, raw, parts)
        left: list[int] = raw.index.tolist()
        return left

    def _match(self, form: Form, raw: "_Raw", parts: list[Part]) -> "_Raw":
        """Reads the messages of one form; returns the others."""
        layout = form.layout
        heads = layout.heads(raw.messages)
        like = layout.matches(heads)
        others = _NOTHING
        if like is not None:
            raw, others = raw.divided(like)
            if not raw.senders:
                return others
            heads = heads[like]
        numbers = layout.numbers(heads)
        rows = np.array(
            [
                sender.row if sender.handle == handle else sender.rows.get(handle, -1)
                for sender, handle in zip(raw.senders, numbers[0].tolist(), strict=True)
            ]
        )
        # The same form may be another model's, and a form of that is found, or made, for it. Row -1 has no model.
        known = self._core.directory.table.cells[rows, RECORD] == form.record.number
        if np.count_nonzero(known) < len(known):
            raw, strangers = raw.divided(known)
            heads, numbers, rows = heads[known], numbers[:, known], rows[known]
            others = others.joined(strangers)
        if raw.senders:
            inputs = layout.arrays(raw.messages)
            parts.append(Part(form, raw.index, raw.senders, rows, numbers, inputs, layout.labels(heads)))
        return others

    def forget(self, engine: Engine) -> None:
        """An engine takes part no more."""
        for size, forms in self._forms.items():
            self._forms[size] = [form for form in forms if form.engine is not engine]

    def new(self, sender: Sender, data: bytes) -> Form | None:
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
        return None if layout is None else Form(layout, session)


@dataclass(slots=True)
class _Raw:
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
    def of_messages(cls, indices: Sequence[int], senders: list[Sender], data: Sequence[bytes]) -> "_Raw":
        return cls(np.array(indices), senders, np.frombuffer(b"".join(data), np.uint8).reshape(len(data), -1))

    def divided(self, chosen: NDArray[np.bool_]) -> tuple["_Raw", "_Raw"]:
        """Those chosen, and the others."""
        return self._where(chosen), self._where(~chosen)

    def joined(self, other: "_Raw") -> "_Raw":
        """Both, in the order in which they came."""
        if not self.senders:
            return other
        index = np.concatenate([self.index, other.index])
        order = np.argsort(index)
        senders = [*self.senders, *other.senders]
        messages = np.concatenate([self.messages, other.messages])
        return _Raw(index[order], [senders[i] for i in order.tolist()], messages[order])

    def _where(self, chosen: NDArray[np.bool_]) -> "_Raw":
        senders = [sender for sender, kept in zip(self.senders, chosen.tolist(), strict=True) if kept]
        return _Raw(self.index[chosen], senders, self.messages[chosen])


_NOTHING = _Raw(np.empty(0, np.int64), [], np.empty((0, 0), np.uint8))
