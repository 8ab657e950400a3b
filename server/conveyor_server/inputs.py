"""From what arrived to what a model takes: the one gate before a session.

Invariant: what passes has the model's names, types and shapes, one length, at least one time step, and only finite
numbers (unless the model says otherwise); so input cannot poison a session. Arrays are views of the message.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, WireError, decode_input, describe_shape, to_numpy_dtype
from conveyor_proto.fingerprint import fingerprint
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2, tensor_pb2


@dataclass(slots=True)
class StepInputs:
    """One step's content.

    Attributes:
        inputs: one for each of ModelSpec.inputs: `[time, *shape]`, or `[*shape]` without time.
        length: time steps, at least 1.
        fingerprint: the same content has the same, however it was sent.
    """

    inputs: Sequence[Array]
    length: int
    fingerprint: int


class StepReader:
    """Reads the steps of one model, the usual one in a few microseconds.

    Args:
        spec: the model's.
    """

    def __init__(self, spec: spec_pb2.ModelSpec) -> None:
        self._spec = spec
        self._only = spec.inputs[0] if len(spec.inputs) == 1 and spec.inputs[0].has_time else None
        self._finite = not spec.allow_non_finite_inputs
        if self._only is not None:
            self._dtype = to_numpy_dtype(self._only.dtype)
            self._shape = (-1, *self._only.shape)
            self._time_step_bytes = self._dtype.itemsize * math.prod(self._only.shape)

    def read(self, tensors: Sequence[tensor_pb2.Tensor], max_time_steps: int) -> StepInputs | Fault:
        """The content of a Step or StepRequest, or why it cannot be used."""
        if self._only is not None and len(tensors) == 1:
            tensor = tensors[0]
            data = tensor.data
            length, rest = divmod(len(data), self._time_step_bytes)
            bare = not tensor.dtype and not tensor.name and not tensor.shape
            if bare and not rest and 0 < length <= max_time_steps:
                array = np.frombuffer(data, self._dtype).reshape(self._shape)
                if not self._finite or all_finite(array):
                    inputs = [array]
                    return StepInputs(inputs, length, fingerprint(inputs))
        try:
            return decode_step(tensors, self._spec, max_time_steps=max_time_steps)
        except WireError as error:
            return error.fault


def decode_step(tensors: Sequence[tensor_pb2.Tensor], spec: spec_pb2.ModelSpec, *, max_time_steps: int) -> StepInputs:
    """The content of a Step or StepRequest.

    Raises:
        WireError: any of the INPUT_ reasons.
    """
    named = _by_name(tensors, spec)
    inputs: list[Array] = []
    length = 0
    for item in spec.inputs:
        tensor = named[item.name]
        array = decode_input(tensor, item)
        inputs.append(array)
        if item.has_time:
            if not 0 < len(array) <= max_time_steps:
                raise WireError(wrong_length(len(array), item, max_time_steps))
            if length and len(array) != length:
                raise _error(
                    e.ERROR_REASON_INPUT_SHAPE,
                    f"input {item.name!r} has {len(array)} time steps and another has {length}: all must agree",
                    input=item.name,
                    expected=f"{length} time steps",
                    got=f"{len(array)} time steps",
                )
            length = len(array)
        if not spec.allow_non_finite_inputs and not all_finite(array):
            raise WireError(non_finite(item))
    return StepInputs(inputs, length, fingerprint(inputs))


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


def wrong_length(length: int, item: spec_pb2.TensorSpec, max_time_steps: int) -> Fault:
    """Why a step of so many time steps cannot be used."""
    if length == 0:
        message = f"input {item.name!r} has no time steps: a step holds at least one"
        return Fault(e.ERROR_REASON_INPUT_EMPTY, message, {"input": item.name})
    return Fault(
        e.ERROR_REASON_INPUT_TOO_LONG,
        f"input {item.name!r} has {length} time steps and one step takes {max_time_steps} here: send several steps",
        {"input": item.name, "max_time_steps": str(max_time_steps), "got": str(length)},
    )


def all_finite(array: Array) -> bool:
    """No NaN and no infinity. A finite sum has finite terms only, and costs less; one that overflows says nothing."""
    if array.dtype.kind != "f":
        return True
    flat = array.reshape(-1)
    # A product with ones: of all sums the fastest. Unlike `dot`, this one does not warn of infinities that cancel out.
    if math.isfinite(np.vdot(flat, _ones(flat.dtype, len(flat)))):  # type: ignore[arg-type]  # of floats, as above
        return True
    return bool(np.isfinite(flat).all())


def _ones(dtype: np.dtype[np.generic], count: int) -> Array:
    known = _ONES.get(dtype)
    if known is None or len(known) < count:
        known = _ONES[dtype] = np.ones(max(1024, count), dtype)
    return known[:count]


_ONES: dict[np.dtype[np.generic], Array] = {}


def non_finite(item: spec_pb2.TensorSpec) -> Fault:
    """Why a step with a NaN or infinity cannot be used."""
    message = (
        f"input {item.name!r} holds NaN or infinity, which would poison the session; nothing moved: replace the value, "
        "or export the model with allow_non_finite_inputs"
    )
    return Fault(e.ERROR_REASON_INPUT_NON_FINITE, message, {"input": item.name})


def _error(reason: e.ErrorReason.ValueType, message: str, **metadata: str) -> WireError:
    return WireError(Fault(reason, message, metadata))
