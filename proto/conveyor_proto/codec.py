"""The one tensor codec: numpy arrays to and from the wire. Little-endian, C order, no copies on the way in.

Decoded arrays are read-only views of the message's bytes. Every refusal is a WireError whose Fault says what to do.
"""

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2, tensor_pb2

if sys.byteorder != "little":
    raise ImportError("Conveyor's wire is little-endian and this machine is not: it is not supported here")

Array = NDArray[np.generic]

_DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[np.generic]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype(np.float32),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype(np.float64),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype(np.float16),
    tensor_pb2.DATA_TYPE_INT8: np.dtype(np.int8),
    tensor_pb2.DATA_TYPE_INT16: np.dtype(np.int16),
    tensor_pb2.DATA_TYPE_INT32: np.dtype(np.int32),
    tensor_pb2.DATA_TYPE_INT64: np.dtype(np.int64),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype(np.uint8),
    tensor_pb2.DATA_TYPE_UINT16: np.dtype(np.uint16),
    tensor_pb2.DATA_TYPE_UINT32: np.dtype(np.uint32),
    tensor_pb2.DATA_TYPE_UINT64: np.dtype(np.uint64),
    tensor_pb2.DATA_TYPE_BOOL: np.dtype(np.bool_),
}
# No more axes than numpy has in any version, and no more items than it multiplies without overflow.
_MOST_AXES = 32
_MOST_ITEMS = 1 << 56
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


class WireError(ValueError):
    """Bytes or tensors that are not what the model or the protocol asks for; `fault` goes back to the sender."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def to_numpy_dtype(data_type: tensor_pb2.DataType.ValueType) -> np.dtype[np.generic]:
    """The numpy dtype of a DataType; WireError (INPUT_DTYPE) for one that is unknown or unspecified."""
    try:
        return _DTYPES[data_type]
    except KeyError:
        raise WireError(
            Fault(
                e.ERROR_REASON_INPUT_DTYPE, f"data type {data_type} is not one of DataType's", {"got": str(data_type)}
            )
        ) from None


def to_data_type(dtype: np.dtype[np.generic]) -> tensor_pb2.DataType.ValueType:
    """The DataType of a numpy dtype; WireError (INPUT_DTYPE) for one that has none, such as object or complex."""
    try:
        return _DATA_TYPES[dtype]
    except KeyError:
        raise WireError(
            Fault(e.ERROR_REASON_INPUT_DTYPE, f"numpy dtype {dtype} cannot be sent: cast it first", {"got": str(dtype)})
        ) from None


def encode(array: Array, name: str = "") -> tensor_pb2.Tensor:
    """A self-describing Tensor of `array`, any shape and memory order."""
    return tensor_pb2.Tensor(name=name, dtype=to_data_type(array.dtype), shape=array.shape, data=array.tobytes())


def decode(tensor: tensor_pb2.Tensor) -> Array:
    """The read-only array of a self-describing Tensor.

    Raises:
        WireError: INPUT_DTYPE, INPUT_SHAPE (a negative dimension, or more than an array can have) or INPUT_SIZE (shape
            and data disagree).
    """
    dtype, data = to_numpy_dtype(tensor.dtype), tensor.data
    if len(tensor.shape) > _MOST_AXES:
        # Before they are multiplied: of a million of them, that would take minutes.
        raise WireError(
            _fault(e.ERROR_REASON_INPUT_SHAPE, tensor.name, f"at most {_MOST_AXES} axes", f"{len(tensor.shape)} axes")
        )
    shape = tuple(tensor.shape)
    count = whole = 1
    for dimension in shape:
        count *= dimension
        # Of an array of nothing, numpy multiplies the others all the same.
        whole *= max(dimension, 1)
        if dimension < 0 or whole > _MOST_ITEMS:
            expected = f"dimensions of 0 or more, and {_MOST_ITEMS} items at most"
            raise WireError(_fault(e.ERROR_REASON_INPUT_SHAPE, tensor.name, expected, str(list(shape))))
    if count * dtype.itemsize != len(data):
        expected = f"{count * dtype.itemsize} bytes for {dtype} {list(shape)}"
        raise WireError(_fault(e.ERROR_REASON_INPUT_SIZE, tensor.name, expected, f"{len(data)} bytes"))
    return np.frombuffer(data, dtype).reshape(shape)


def decode_input(tensor: tensor_pb2.Tensor, spec: spec_pb2.TensorSpec) -> Array:
    """The read-only array of one step's input: `[time, *shape]`, or `[*shape]` where the input has no time.

    An unspecified dtype or an empty shape takes the model's own, so that a lean client sends bytes alone.

    Raises:
        WireError: INPUT_DTYPE, INPUT_SHAPE or INPUT_SIZE, with metadata input, expected, got.
    """
    dtype = to_numpy_dtype(spec.dtype)
    if tensor.dtype not in {tensor_pb2.DATA_TYPE_UNSPECIFIED, spec.dtype}:
        got = tensor_pb2.DataType.Name(tensor.dtype) if tensor.dtype in _DTYPES else str(tensor.dtype)
        raise WireError(_fault(e.ERROR_REASON_INPUT_DTYPE, spec.name, str(dtype), got))
    row = tuple(spec.shape)
    row_bytes = dtype.itemsize
    for dimension in row:
        row_bytes *= dimension
    size = len(tensor.data)
    if not spec.has_time:
        shape = row
        fits = size == row_bytes
    else:
        time_steps = size // row_bytes
        shape = (time_steps, *row)
        fits = size == time_steps * row_bytes
    given = tuple(tensor.shape)
    if given and given != shape and (len(given) != len(shape) or given[1:] != row or not spec.has_time):
        raise WireError(_fault(e.ERROR_REASON_INPUT_SHAPE, spec.name, describe_shape(spec), str(list(given))))
    if not fits or (given and given != shape):
        expected = f"{row_bytes} bytes for each of {describe_shape(spec)}"
        raise WireError(_fault(e.ERROR_REASON_INPUT_SIZE, spec.name, expected, f"{size} bytes"))
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def decode_column(data: bytes, spec: spec_pb2.TensorSpec, rows: int) -> Array:
    """The read-only array `[rows, *shape]` of a frame's column (rows: time steps, where the input has time).

    Raises:
        WireError: INPUT_SIZE.
    """
    dtype, row = to_numpy_dtype(spec.dtype), tuple(spec.shape)
    shape = (rows, *row)
    expected = dtype.itemsize
    for dimension in shape:
        expected *= dimension
    if len(data) != expected:
        what = f"{expected} bytes for {rows} rows of {dtype} {list(row)}"
        raise WireError(_fault(e.ERROR_REASON_INPUT_SIZE, spec.name, what, f"{len(data)} bytes"))
    return np.frombuffer(data, dtype).reshape(shape)


def decode_integers(data: bytes, dtype: type[np.uint32] | type[np.uint64], rows: int, what: str) -> Array:
    """The read-only vector `[rows]` of a frame's handles, seqs, lengths or acked_seqs; rows < 0: as many as there are.

    Raises:
        WireError: FRAME_INVALID, naming `what`.
    """
    size = np.dtype(dtype).itemsize
    if len(data) % size or (rows >= 0 and len(data) != rows * size):
        expected = f"a multiple of {size}" if rows < 0 else str(rows * size)
        message = f"the frame's {what} take {expected} bytes (little-endian {dtype.__name__}) and {len(data)} came"
        raise WireError(Fault(e.ERROR_REASON_FRAME_INVALID, message, {"field": what}))
    return np.frombuffer(data, dtype)


def pack(arrays: Sequence[Array]) -> bytes:
    """The bytes of arrays laid one after the other, C order."""
    return b"".join([array.tobytes() for array in arrays])


def describe_shape(spec: spec_pb2.TensorSpec) -> str:
    """How a person writes the shape that a step takes: `[time, 64]`."""
    return "[" + ", ".join([*(["time"] if spec.has_time else []), *map(str, spec.shape)]) + "]"


def _fault(reason: e.ErrorReason.ValueType, name: str, expected: str, got: str) -> Fault:
    message = f"input {name!r} takes {expected}, and {got} came"
    return Fault(reason, message, {"input": name, "expected": expected, "got": got})
