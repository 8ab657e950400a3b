"""Step messages that are alike but for their numbers and data: found once, then read by the hundred as one array.

Invariant: a message that matches a layout says the same as protobuf would read in it. What does not match any (another
writer's order of fields, unknown fields, a field twice) is left to protobuf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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
# Sums of the bits of numbers of so many bytes are exact in float64, whose products are much faster than int64's.
_EXACT_VARINT = 7

_Item = TypeVar("_Item", bound=np.generic)


class _Unlike(Exception):  # noqa: N818 - it says what was found
    """The message has a form that layouts do not have."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop - 1` of a message."""

    start: int
    stop: int


class StepLayout:
    """Where everything lies in a Step of one form and size.

    What is no data is its head: the same in all messages of the layout, but for the low seven bits of the numbers'
    bytes.

    Args:
        message: one that has the layout.
        numbers: span of the handle, the seq and the acked_seq; None where the message does not have it.
        inputs: dtype, shape `[time, *shape]` or `[*shape]`, and span of each of ModelSpec.inputs.
        length: time steps.
        timeout_ms: the same in all messages of this layout.

    Attributes:
        message: as given.
        mask: what is compared of a message, a byte for each of its bytes: 0 where data lies.
        numbers_at: start and stop of the handle, the seq and the acked_seq; the same twice where there is none.
        inputs_at: start of each of ModelSpec.inputs.
        label_at: start and stop of handle and seq with their tags, as in a StepResult; None where they lie otherwise.
        label_sizes: bytes of the handle and of the seq.
    """

    def __init__(
        self,
        message: bytes,
        numbers: Sequence[Span | None],
        inputs: Sequence[tuple[np.dtype[np.generic], tuple[int, ...], Span]],
        *,
        length: int,
        timeout_ms: int,
    ) -> None:
        self.length = length
        self.timeout_ms = timeout_ms
        self.has_acked_seq = numbers[2] is not None
        handle, seq = (span or Span(0, 0) for span in numbers[:2])
        self.label_sizes = (handle.stop - handle.start, seq.stop - seq.start)
        self._inputs = inputs
        data = sorted((span for _, _, span in inputs), key=lambda span: span.start)
        starts, stops = [0, *(span.stop for span in data)], [*(span.start for span in data), len(message)]
        self._parts = [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
        # What is compared of a message: all bits of the head, and of a number's bytes whether another follows.
        mask = np.full(len(message), 0xFF, np.uint8)
        # A number is the sum of its bytes' low bits, each by its weight.
        longest = max(span.stop - span.start for span in numbers if span is not None)
        weights = np.zeros((len(message), len(numbers)), np.float64 if longest <= _EXACT_VARINT else np.int64)
        for number, span in enumerate(numbers):
            if span is not None:
                mask[span.start : span.stop] = 0x80
                weights[span.start : span.stop, number] = [1 << (7 * turn) for turn in range(span.stop - span.start)]
        for span in data:
            mask[span.start : span.stop] = 0
        self.message, self.mask = message, mask.tobytes()
        self.numbers_at = [(span.start, span.stop) if span is not None else (0, 0) for span in numbers]
        self.inputs_at = [span.start for _, _, span in inputs]
        self._mask, self._weights = self._cut(mask), self._cut(weights)
        self._wanted = self._cut(np.frombuffer(message, np.uint8)) & self._mask
        # Where both numbers lie as in a StepResult, tags included: tag, handle, tag, seq.
        beside = numbers[1] is not None and (handle.stop + 1 == seq.start or numbers[0] is None)
        first = seq if numbers[0] is None else handle
        self._label = slice(first.start - 1, seq.stop) if beside and seq.stop <= self._parts[0].stop else None
        self.label_at = None if self._label is None else (self._label.start, self._label.stop)

    def heads(self, messages: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is no data of messages `[count, size]`: `[count, head]`."""
        parts = [messages[:, part] for part in self._parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def matches(self, heads: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
        """Which of the heads are of messages of this layout; None: all of them."""
        other = (heads & self._mask) != self._wanted
        if not np.count_nonzero(other):
            return None
        like: NDArray[np.bool_] = ~other.any(axis=1)
        return like

    def numbers(self, heads: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Handle, seq and acked_seq of messages that match: `[3, count]`; 0 for what they do not have."""
        return np.ascontiguousarray(((heads & 0x7F) @ self._weights).T, np.int64)

    def labels(self, heads: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Handle and seq, with their tags, as they were sent: `[count, bytes]`; None where they lie otherwise."""
        return None if self._label is None else heads[:, self._label]

    def arrays(self, messages: NDArray[np.uint8]) -> list[Array]:
        """The inputs of messages that match, in the order of ModelSpec.inputs: `[count, time, *shape]`."""
        count = len(messages)
        return [
            np.ascontiguousarray(messages[:, span.start : span.stop]).view(dtype).reshape(count, *shape)
            for dtype, shape, span in self._inputs
        ]

    def _cut(self, bytewise: NDArray[_Item]) -> NDArray[_Item]:
        return np.concatenate([bytewise[part] for part in self._parts])


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
    spans_of_numbers = [fields.get(tag) for tag in (_HANDLE, _SEQ, _ACKED)]
    if not any(spans_of_numbers):
        return None
    return StepLayout(message, spans_of_numbers, inputs, length=length, timeout_ms=step.timeout_ms)


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
