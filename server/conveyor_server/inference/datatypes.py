"""The protocol's tensors: names of datatypes, raw and typed contents.

Invariant: what is read is a read-only array of exactly the shape that the request says, or a Fault naming the input,
which tells no more of what came than a line holds.
"""

import math
from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array, WireError, to_numpy_dtype
from conveyor_proto.inference import model_config_pb2, service_pb2
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from numpy.typing import NDArray

# By data type: the protocol's name of it, and the field of InferTensorContents that carries it; FP16 goes raw only.
_NAMES: dict[tensor_pb2.DataType.ValueType, tuple[str, str]] = {
    tensor_pb2.DATA_TYPE_BOOL: ("BOOL", "bool_contents"),
    tensor_pb2.DATA_TYPE_INT8: ("INT8", "int_contents"),
    tensor_pb2.DATA_TYPE_INT16: ("INT16", "int_contents"),
    tensor_pb2.DATA_TYPE_INT32: ("INT32", "int_contents"),
    tensor_pb2.DATA_TYPE_INT64: ("INT64", "int64_contents"),
    tensor_pb2.DATA_TYPE_UINT8: ("UINT8", "uint_contents"),
    tensor_pb2.DATA_TYPE_UINT16: ("UINT16", "uint_contents"),
    tensor_pb2.DATA_TYPE_UINT32: ("UINT32", "uint_contents"),
    tensor_pb2.DATA_TYPE_UINT64: ("UINT64", "uint64_contents"),
    tensor_pb2.DATA_TYPE_FLOAT16: ("FP16", ""),
    tensor_pb2.DATA_TYPE_FLOAT32: ("FP32", "fp32_contents"),
    tensor_pb2.DATA_TYPE_FLOAT64: ("FP64", "fp64_contents"),
}
_BYTES = "BYTES"
# Of what is told again to who sent it: characters, or sizes of a shape.
_MOST_TOLD = 32
# In front of each element of BYTES that comes raw: its length, little-endian.
_LENGTH_BYTES = 4


def datatype(item: spec_pb2.TensorSpec | spec_pb2.StateSpec) -> str:
    """The protocol's name of a tensor's data type: `FP32`."""
    return _NAMES[item.dtype][0]


def config_type(item: spec_pb2.TensorSpec | spec_pb2.StateSpec) -> model_config_pb2.DataType.ValueType:
    """The same as ModelConfig has it: `TYPE_FP32`."""
    return model_config_pb2.DataType.Value(f"TYPE_{datatype(item)}")


def read_tensor(
    tensor: service_pb2.ModelInferRequest.InferInputTensor,
    raw: bytes | None,
    item: spec_pb2.TensorSpec,
    model: str,
) -> Array:
    """An input as the request shapes it.

    Args:
        tensor: its description, and its contents where there is no `raw`. Its shape was judged, and has no size of 0.
        raw: its entry of raw_input_contents; None: there are none.
        item: what the model takes.
        model: for the text of a refusal.

    Raises:
        WireError: INPUT_DTYPE, INPUT_SHAPE or INPUT_SIZE.
    """
    dtype = to_numpy_dtype(item.dtype)
    wanted = datatype(item)
    if tensor.datatype != wanted:
        raise _refusal(
            e.ERROR_REASON_INPUT_DTYPE,
            f"inference input '{item.name}' data-type is '{tensor.datatype[:_MOST_TOLD]}', but model '{model}' expects "
            f"'{wanted}'",
            item,
            wanted,
            tensor.datatype,
        )
    shape = tuple(tensor.shape)
    count = math.prod(shape)
    if raw is None:
        return _typed(tensor, item, shape, model)
    if len(raw) != count * dtype.itemsize:
        raise _refusal(
            e.ERROR_REASON_INPUT_SIZE,
            f"unexpected total byte size {len(raw)} for input '{item.name}' of model '{model}', expecting "
            f"{count * dtype.itemsize} for {wanted} {list(shape)}",
            item,
            str(count * dtype.itemsize),
            str(len(raw)),
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def bad_shape(item: spec_pb2.TensorSpec, model: str, shape: Sequence[int], expected: str) -> WireError:
    """The refusal of a shape, to be raised by the caller."""
    got = "[" + ",".join([*map(str, shape[:_MOST_TOLD]), *(["..."] if len(shape) > _MOST_TOLD else [])]) + "]"
    return _refusal(
        e.ERROR_REASON_INPUT_SHAPE,
        f"unexpected shape for input '{item.name}' for model '{model}'. Expected {expected}, got {got}",
        item,
        expected,
        got,
    )


def is_text(tensor: service_pb2.ModelInferRequest.InferInputTensor, item: spec_pb2.TensorSpec) -> bool:
    """A text is given for time steps that are single numbers, and hold a byte: what a model of bytes reads."""
    dtype = to_numpy_dtype(item.dtype)
    return tensor.datatype == _BYTES and item.has_time and not item.shape and dtype.kind in "iu" and dtype != np.int8


def read_text(
    tensor: service_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None, item: spec_pb2.TensorSpec, model: str
) -> NDArray[np.uint8]:
    """The only element of BYTES that `is_text`, as `[time]` or `[1, time]`: each of its bytes is a time step.

    Args:
        tensor: its description, and its contents where there is no `raw`.
        raw: its entry of raw_input_contents; None: there are none.
        item: what the model takes.
        model: for the text of a refusal.

    Raises:
        WireError: INPUT_SHAPE: there is none, or there are several.
    """
    shape = tuple(tensor.shape)
    elements = list(tensor.contents.bytes_contents)
    if raw is not None:
        size = int.from_bytes(raw[:_LENGTH_BYTES], "little")
        elements = [raw[_LENGTH_BYTES:]] if len(raw) == _LENGTH_BYTES + size else []
    if shape not in {(1,), (1, 1)} or len(elements) != 1:
        raise bad_shape(
            item,
            model,
            shape,
            "one element of BYTES, [1] or [1,1], each of whose bytes is a time step (raw, its length in four bytes "
            "comes before it)",
        )
    return np.frombuffer(elements[0], np.uint8).reshape((*shape[1:], -1))


def _typed(
    tensor: service_pb2.ModelInferRequest.InferInputTensor,
    item: spec_pb2.TensorSpec,
    shape: tuple[int, ...],
    model: str,
) -> Array:
    dtype = to_numpy_dtype(item.dtype)
    field = _NAMES[item.dtype][1]
    filled = {descriptor.name for descriptor, _ in tensor.contents.ListFields()}
    if filled - {field} or not field:
        raise _refusal(
            e.ERROR_REASON_INPUT_DTYPE,
            f"input '{item.name}' of model '{model}' is {tensor.datatype}: send it in "
            + (f"contents.{field}, or in raw_input_contents" if field else "raw_input_contents"),
            item,
            field or "raw_input_contents",
            ", ".join(sorted(filled)) or "no contents",
        )
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise _refusal(
            e.ERROR_REASON_INPUT_SIZE,
            f"unexpected number of elements {len(values)} for input '{item.name}' of model '{model}', expecting "
            f"{math.prod(shape)} for {list(shape)}",
            item,
            str(math.prod(shape)),
            str(len(values)),
        )
    if dtype.kind in "iu" and len(values) and not _fit(values, dtype):
        raise _refusal(
            e.ERROR_REASON_INPUT_DTYPE,
            f"input '{item.name}' of model '{model}' holds numbers that are no {tensor.datatype}",
            item,
            tensor.datatype,
            f"{min(values)} to {max(values)}",
        )
    array = np.array(values, dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _fit(values: Sequence[int], dtype: np.dtype[np.generic]) -> bool:
    bounds = np.iinfo(dtype)  # type: ignore[type-var]
    return int(bounds.min) <= min(values) and max(values) <= int(bounds.max)


def _refusal(
    reason: e.ErrorReason.ValueType, message: str, item: spec_pb2.TensorSpec, expected: str, got: str
) -> WireError:
    return WireError(Fault(reason, message, {"input": item.name, "expected": expected, "got": got[:200]}))
