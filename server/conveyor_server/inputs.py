"""From what arrived to what a model takes: the one gate before a session.

Invariant: what passes has the model's names, types and shapes, one length, at least one time step, and only finite
numbers (unless the model says otherwise); so input cannot poison a session. Arrays are views of the message.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, WireError, decode_column, decode_input, decode_integers, describe_shape
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2


@dataclass(slots=True)
class StepInputs:
    """One step's content.

    Attributes:
        inputs: one for each of ModelSpec.inputs: `[time, *shape]`, or `[*shape]` without time.
        length: time steps, at least 1.
        fingerprint: CRC-32 over the inputs' bytes in order: the same content has the same, however it was sent.
    """

    inputs: Sequence[Array]
    length: int
    fingerprint: int


@dataclass(frozen=True, slots=True)
class FrameRows:
    """A columnar frame, row by row.

    Attributes:
        handles, seqs: of each row.
        acked_seqs: of each row, 0 where the client says nothing.
        rows: content of each row, or why it cannot be used.
    """

    handles: Sequence[int]
    seqs: Sequence[int]
    acked_seqs: Sequence[int]
    rows: Sequence[StepInputs | Fault]


def decode_step(tensors: Sequence[tensor_pb2.Tensor], spec: spec_pb2.ModelSpec, *, max_time_steps: int) -> StepInputs:
    """The content of a Step or StepRequest.

    Raises:
        WireError: any of the INPUT_ reasons.
    """
    named = _by_name(tensors, spec)
    inputs: list[Array] = []
    length = 0
    fingerprint = 0
    for item in spec.inputs:
        tensor = named[item.name]
        array = decode_input(tensor, item)
        inputs.append(array)
        fingerprint = zlib.crc32(tensor.data, fingerprint)
        if item.has_time:
            if not 0 < len(array) <= max_time_steps:
                raise WireError(_wrong_length(len(array), item, max_time_steps))
            if length and len(array) != length:
                raise _error(
                    e.ERROR_REASON_INPUT_SHAPE,
                    f"input {item.name!r} has {len(array)} time steps and another has {length}: all must agree",
                    input=item.name,
                    expected=f"{length} time steps",
                    got=f"{len(array)} time steps",
                )
            length = len(array)
        if not spec.allow_non_finite_inputs and not _finite(array):
            raise WireError(_non_finite(item))
    return StepInputs(inputs, length, fingerprint)


def decode_frame(frame: session_pb2.StepFrame, spec: spec_pb2.ModelSpec, *, max_time_steps: int) -> FrameRows:
    """The content of a columnar frame; a row that cannot be used does not harm the others.

    Raises:
        WireError: FRAME_INVALID, INPUT_MISSING, INPUT_UNKNOWN or INPUT_SIZE: the frame as a whole cannot be read.
    """
    handles = decode_integers(frame.handles, np.uint32, -1, "handles")
    count = len(handles)
    if count == 0:
        raise _error(e.ERROR_REASON_FRAME_INVALID, "a frame without rows: send at least one handle", field="handles")
    if len(set(handles.tolist())) != count:
        message = "a frame holds a handle twice: send a session's steps in frames of their own"
        raise _error(e.ERROR_REASON_FRAME_INVALID, message, field="handles")
    seqs = decode_integers(frame.seqs, np.uint64, count, "seqs")
    acked = (
        decode_integers(frame.acked_seqs, np.uint64, count, "acked_seqs").tolist() if frame.acked_seqs else [0] * count
    )
    lengths = (
        decode_integers(frame.lengths, np.uint32, count, "lengths") if frame.lengths else np.ones(count, np.uint32)
    )
    columns = _columns(frame.columns, spec, count, int(lengths.sum(dtype=np.uint64)))
    stops = np.cumsum(lengths, dtype=np.int64).tolist()
    starts = [0, *stops[:-1]]
    rows = [
        _row(columns, row, start, stop, max_time_steps)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
    return FrameRows(handles.tolist(), seqs.tolist(), acked, rows)


@dataclass(frozen=True, slots=True)
class _Column:
    item: spec_pb2.TensorSpec
    array: Array
    data: memoryview
    row_bytes: int
    has_time: bool
    # All rows may pass: looked at once for the whole column, and row by row only when something is wrong.
    finite: bool


def _row(columns: Sequence[_Column], row: int, start: int, stop: int, max_time_steps: int) -> StepInputs | Fault:
    inputs: list[Array] = []
    fingerprint = 0
    for column in columns:
        item = column.item
        if not column.has_time:
            first, last = row, row + 1
        elif 0 < stop - start <= max_time_steps:
            first, last = start, stop
        else:
            return _wrong_length(stop - start, item, max_time_steps)
        part = column.array[first:last]
        if not column.finite and not _finite(part):
            return _non_finite(item)
        inputs.append(part if column.has_time else part[0])
        fingerprint = zlib.crc32(column.data[first * column.row_bytes : last * column.row_bytes], fingerprint)
    return StepInputs(inputs, stop - start, fingerprint)


def _columns(data: Sequence[bytes], spec: spec_pb2.ModelSpec, rows: int, time_steps: int) -> list[_Column]:
    if len(data) != len(spec.inputs):
        missing = len(data) < len(spec.inputs)
        reason = e.ERROR_REASON_INPUT_MISSING if missing else e.ERROR_REASON_INPUT_UNKNOWN
        name = spec.inputs[len(data)].name if missing else f"#{len(spec.inputs)}"
        message = f"the model takes {len(spec.inputs)} columns and {len(data)} came: send one for each input, in order"
        raise _error(reason, message, input=name, expected=str(len(spec.inputs)), got=str(len(data)))
    columns: list[_Column] = []
    for part, item in zip(data, spec.inputs, strict=True):
        array = decode_column(part, item, time_steps if item.has_time else rows)
        row_bytes = array.itemsize * math.prod(item.shape)
        finite = spec.allow_non_finite_inputs or _finite(array)
        columns.append(_Column(item, array, memoryview(part), row_bytes, item.has_time, finite))
    return columns


def _by_name(tensors: Sequence[tensor_pb2.Tensor], spec: spec_pb2.ModelSpec) -> dict[str, tensor_pb2.Tensor]:
    names = [item.name for item in spec.inputs]
    named: dict[str, tensor_pb2.Tensor] = {}
    for position, tensor in enumerate(tensors):
        name = tensor.name or (names[position] if position < len(names) else f"#{position}")
        if name not in names:
            message = f"the model has no input {name!r}; it takes {', '.join(map(repr, names))}"
            raise _error(e.ERROR_REASON_INPUT_UNKNOWN, message, input=name, expected=", ".join(names))
        if name in named:
            raise _error(e.ERROR_REASON_INPUT_REPEATED, f"input {name!r} came twice", input=name)
        named[name] = tensor
    for item in spec.inputs:
        if item.name not in named:
            message = f"input {item.name!r} is missing: send {describe_shape(item)}"
            raise _error(e.ERROR_REASON_INPUT_MISSING, message, input=item.name, expected=describe_shape(item))
    return named


def _wrong_length(length: int, item: spec_pb2.TensorSpec, max_time_steps: int) -> Fault:
    if length == 0:
        message = f"input {item.name!r} has no time steps: a step holds at least one"
        return Fault(e.ERROR_REASON_INPUT_EMPTY, message, {"input": item.name})
    return Fault(
        e.ERROR_REASON_INPUT_TOO_LONG,
        f"input {item.name!r} has {length} time steps and one step takes {max_time_steps} here: send several steps",
        {"input": item.name, "max_time_steps": str(max_time_steps), "got": str(length)},
    )


def _finite(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _non_finite(item: spec_pb2.TensorSpec) -> Fault:
    message = (
        f"input {item.name!r} holds NaN or infinity, which would poison the session; nothing moved: replace the value, "
        "or export the model with allow_non_finite_inputs"
    )
    return Fault(e.ERROR_REASON_INPUT_NON_FINITE, message, {"input": item.name})


def _error(reason: e.ErrorReason.ValueType, message: str, **metadata: str) -> WireError:
    return WireError(Fault(reason, message, metadata))
