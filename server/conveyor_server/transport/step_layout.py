"""Step messages that are alike but for their numbers and data: found once, then read by the hundred as one array.

Invariant: a message that matches a layout says the same as protobuf would read in it. What does not match any (another
writer's order of fields, unknown fields, a field twice) is left to protobuf.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import session_pb2, spec_pb2
from numpy.typing import NDArray

# Tags of StreamRequest.step, of Step's fields and of Tensor's: number << 3 | wire type.
STEP_TAG = 0x12
FRAME_TAG = 0x1A
_HANDLE, _SEQ, _INPUT, _TIMEOUT, _ACKED = 0x08, 0x10, 0x1A, 0x20, 0x28
_NAME, _DTYPE, _SHAPE, _DATA = 0x0A, 0x10, 0x1A, 0x22
_LENGTH_DELIMITED = 2
# Seqs of more bytes may not fit an int64.
_LONGEST_VARINT = 9


class _Unlike(Exception):  # noqa: N818 - it says what was found
    """The message has a form that layouts do not have."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop - 1` of a message."""

    start: int
    stop: int

    def numbers(self, messages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The varints that lie here, of each message; 0 where the span is empty."""
        if self.start == self.stop:
            return np.zeros(len(messages), np.int64)
        values = messages[:, self.start].astype(np.int64) & 0x7F
        for shift, column in enumerate(range(self.start + 1, self.stop), 1):
            values |= (messages[:, column].astype(np.int64) & 0x7F) << (7 * shift)
        return values


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where everything lies in a Step of one form and size.

    Attributes:
        handle, seq, acked_seq: of these fields; empty where the message does not have them.
        timeout_ms: the same in all messages of this layout.
        inputs: dtype, shape `[time, *shape]` or `[*shape]`, and span of each of ModelSpec.inputs.
        length: time steps.
    """

    handle: Span
    seq: Span
    acked_seq: Span
    timeout_ms: int
    inputs: Sequence[tuple[np.dtype[np.generic], tuple[int, ...], Span]]
    length: int
    _blocks: Sequence[tuple[slice, NDArray[np.uint8], NDArray[np.uint8]]]

    def matches(self, messages: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
        """Which of the messages `[count, size]` have this layout; None: all of them."""
        alike = [(messages[:, block] & mask) == wanted for block, mask, wanted in self._blocks]
        if all(found.all() for found in alike):
            return None
        like: NDArray[np.bool_] = np.logical_and.reduce([found.all(axis=1) for found in alike])
        return like

    def arrays(self, messages: NDArray[np.uint8]) -> list[Array]:
        """The inputs of messages that match, in the order of ModelSpec.inputs: `[count, time, *shape]`."""
        count = len(messages)
        return [
            np.ascontiguousarray(messages[:, span.start : span.stop]).view(dtype).reshape(count, *shape)
            for dtype, shape, span in self.inputs
        ]


def find_layout(message: bytes, step: session_pb2.Step, spec: spec_pb2.ModelSpec, length: int) -> StepLayout | None:
    """The layout of a message, or None where it has none.

    Args:
        message: a StreamRequest that holds a step.
        step: the same, as protobuf reads it; its inputs are valid for the model.
        spec: the model's.
        length: its time steps.
    """
    try:
        fields, tensors = _scan(message)
    except (_Unlike, IndexError):
        return None
    names = [item.name for item in spec.inputs]
    both = zip(step.inputs, tensors, strict=True)
    spans = {tensor.name or names[position]: span for position, (tensor, span) in enumerate(both)}
    inputs = [
        (to_numpy_dtype(item.dtype), ((length, *item.shape) if item.has_time else (*item.shape,)), spans[item.name])
        for item in spec.inputs
    ]
    nowhere = Span(0, 0)
    handle, seq, acked = (fields.get(tag, nowhere) for tag in (_HANDLE, _SEQ, _ACKED))
    # What is no data is compared: all bits of what is the same in all, and of a number's bytes whether another follows.
    mask = np.full(len(message), 0xFF, np.uint8)
    for span in (handle, seq, acked):
        mask[span.start : span.stop] = 0x80
    wanted = np.frombuffer(message, np.uint8) & mask
    stops = [0, *(span.stop for span in tensors)]
    starts = [*(span.start for span in tensors), len(message)]
    blocks = [slice(start, stop) for start, stop in zip(stops, starts, strict=True) if start < stop]
    return StepLayout(
        handle,
        seq,
        acked,
        step.timeout_ms,
        inputs,
        length,
        _blocks=[(block, mask[block], wanted[block]) for block in blocks],
    )


def _scan(message: bytes) -> tuple[dict[int, Span], list[Span]]:
    """Spans of the numbers by tag, and of the tensors' data in the order in which they come."""
    if message[0] != STEP_TAG:
        raise _Unlike
    at, size = _varint(message, 1)
    if at + size != len(message):
        raise _Unlike
    numbers: dict[int, Span] = {}
    tensors: list[Span] = []
    while at < len(message):
        tag = message[at]
        stop, value = _varint(message, at + 1)
        if tag == _INPUT:
            tensors.append(_scan_tensor(message, stop, stop + value))
            stop += value
        elif tag not in {_HANDLE, _SEQ, _TIMEOUT, _ACKED} or tag in numbers:
            raise _Unlike
        else:
            numbers[tag] = Span(at + 1, stop)
        at = stop
    # Held as a fixed part of the message.
    numbers.pop(_TIMEOUT, None)
    return numbers, tensors


def _scan_tensor(message: bytes, at: int, end: int) -> Span:
    data = Span(0, 0)
    seen: set[int] = set()
    while at < end:
        tag = message[at]
        stop, value = _varint(message, at + 1)
        if tag not in {_NAME, _DTYPE, _SHAPE, _DATA} or tag in seen:
            raise _Unlike
        seen.add(tag)
        if tag == _DATA:
            data = Span(stop, stop + value)
        at = stop + value if tag & 7 == _LENGTH_DELIMITED else stop
    if at != end or _DATA not in seen:
        raise _Unlike
    return data


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Where the varint at `at` ends, and its value."""
    value = 0
    for turn in range(_LONGEST_VARINT):
        byte = message[at + turn]
        value |= (byte & 0x7F) << (7 * turn)
        if byte < 0x80:
            return at + turn + 1, value
    raise _Unlike
