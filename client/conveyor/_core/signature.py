"""What a model takes and returns, in numpy terms: checks and casts inputs before they are sent, shapes the answers.

Invariant: an array's rank alone decides whether it is one time step (the row's rank) or a chunk (one more).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from conveyor_proto.codec import Array, WireError, to_numpy_dtype
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2
from numpy.typing import ArrayLike, NDArray

from conveyor._core.answer import Buffer
from conveyor.errors import ConveyorError, ProtocolError, from_fault

# One array where the model has a single input, else a dict by name.
Inputs = ArrayLike | Mapping[str, ArrayLike]
# One array where the model has a single output, else a dict of arrays by name. Any, so that callers need no cast.
Outputs = Any


@dataclass(frozen=True, slots=True)
class Field:
    """One input or output, as numpy sees it.

    Attributes:
        name: the model's name for it.
        dtype: element type.
        shape: shape of one row and one time step.
        has_time: whether a chunk has a leading time axis here.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    has_time: bool

    @classmethod
    def of(cls, spec: spec_pb2.TensorSpec) -> "Field":
        """Reads the contract's description."""
        return cls(spec.name, to_numpy_dtype(spec.dtype), tuple(spec.shape), spec.has_time)

    def describe(self, *, axes: Sequence[str] = ()) -> str:
        """How a person writes the shapes: `float32 [64]`, with leading `axes`."""
        return f"{self.dtype} [{', '.join([*axes, *map(str, self.shape)])}]"

    def cast(self, value: ArrayLike) -> Array:
        """`value` as a C-ordered array of the model's dtype, unless that would lose what the caller meant.

        Raises:
            InvalidInput: another kind of number (float for an integer input, text, complex), or a value out of range.
        """
        if isinstance(value, np.ndarray) and value.dtype == self.dtype and value.flags.c_contiguous:
            return value
        try:
            array = np.asarray(value)
        except ValueError as error:  # a list of lists of different lengths
            raise self.refuse(e.ERROR_REASON_INPUT_SHAPE, "a rectangular array", f"uneven lists ({error})") from None
        if array.dtype == self.dtype:
            return np.ascontiguousarray(array).reshape(array.shape)
        if not _same_meaning(array.dtype, self.dtype):
            raise self.refuse(e.ERROR_REASON_INPUT_DTYPE, str(self.dtype), f"{array.dtype}: cast it first")
        with np.errstate(over="ignore"):
            converted = np.asarray(array.astype(self.dtype, order="C"))
        if not _kept(array, converted):
            message = f"{array.dtype} values out of its range"
            raise self.refuse(e.ERROR_REASON_INPUT_DTYPE, str(self.dtype), message)
        return converted

    def refuse(self, reason: e.ErrorReason.ValueType, expected: str, got: str) -> ConveyorError:
        """The InvalidInput for an input that does not fit."""
        message = f"input {self.name!r} takes {expected}, and {got} came"
        return from_fault(Fault(reason, message, {"input": self.name, "expected": expected, "got": got}))


def _same_meaning(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    if given.kind in "iu" and wanted.kind in "iu":
        return True
    return given.kind in "biuf" and np.can_cast(given, wanted, "same_kind")


def _kept(given: NDArray[Any], converted: NDArray[Any]) -> bool:
    """Whether a cast of the same meaning kept the values: integers exactly, floats within their range."""
    if converted.dtype.kind in "iu":
        return bool(np.array_equal(given, converted))
    if given.dtype.kind == "f" and converted.dtype.itemsize >= given.dtype.itemsize:
        return True
    return bool(np.array_equal(np.isfinite(given), np.isfinite(converted)))


class Prepared(NamedTuple):
    """One step's inputs, checked and cast.

    Attributes:
        data: one per model input, in its order, its bytes: `[time, *shape]`, or `[*shape]` where the input has no time.
            The lean wire form, for position and size say the rest. Copies: the caller's arrays may change.
        time_steps: how many time steps.
        one: a single time step came without its time axis, and the answer goes back without it.
    """

    data: Sequence[bytes]
    time_steps: int
    one: bool


class Signature:
    """A model's inputs and outputs."""

    def __init__(self, spec: spec_pb2.ModelSpec) -> None:
        self.model = spec.name
        self.inputs = tuple(map(Field.of, spec.inputs))
        self.outputs = tuple(map(Field.of, spec.outputs))
        # The input of a model that has only one, and takes it by time steps.
        self._only = self.inputs[0] if len(self.inputs) == 1 and self.inputs[0].has_time else None

    def prepare(self, given: Inputs) -> Prepared:
        """Checks one step of one session.

        Args:
            given: an array (one input) or a dict by name (several): `[*shape]` for one time step, `[time, *shape]` for
                a chunk.

        Raises:
            InvalidInput: a name, shape, dtype or number of time steps that the model does not take.
        """
        only = self._only
        if only is not None and type(given) is np.ndarray and given.dtype == only.dtype and given.shape == only.shape:
            # What nearly every step is: nothing to name, cast or agree upon.
            return Prepared((given.tobytes(),), 1, True)
        data: list[bytes] = []
        one: bool | None = None
        time_steps = 1
        for field, value in zip(self.inputs, self.by_name(given), strict=True):
            array = field.cast(value)
            extra = array.ndim - len(field.shape)
            fits = array.shape[max(extra, 0) :] == field.shape and extra in ((0, 1) if field.has_time else (0,))
            if not fits:
                expected = field.describe()
                if field.has_time:
                    expected += f" for one time step or {field.describe(axes=['time'])} for a chunk"
                raise field.refuse(e.ERROR_REASON_INPUT_SHAPE, expected, f"shape {list(array.shape)}")
            data.append(array.tobytes())
            if not field.has_time:
                continue
            steps = array.shape[0] if extra else 1
            if one is not None and (one != (extra == 0) or steps != time_steps):
                expected = "one time step" if one else f"a chunk of {time_steps} time steps, as the other inputs"
                raise field.refuse(e.ERROR_REASON_INPUT_SHAPE, expected, f"shape {list(array.shape)}")
            if steps == 0:
                raise field.refuse(e.ERROR_REASON_INPUT_EMPTY, "at least one time step", "a chunk of none")
            one, time_steps = extra == 0, steps
        return Prepared(data, time_steps, bool(one))

    def by_name(self, given: Any) -> list[Any]:
        """The values in the model's order of inputs.

        Raises:
            InvalidInput: a missing or unknown name, or one value where the model has several inputs.
        """
        names = [field.name for field in self.inputs]
        if not isinstance(given, Mapping):
            if len(names) == 1:
                return [given]
            given = {}
        for name in given:
            if name not in names:
                message = f"the model has no input {name!r}: it takes {', '.join(map(repr, names))}"
                raise from_fault(Fault(e.ERROR_REASON_INPUT_UNKNOWN, message, {"input": str(name)}))
        for name in names:
            if name not in given:
                what = "a dict with " + ", ".join(map(repr, names)) if len(names) > 1 else repr(name)
                message = f"input {name!r} is missing: the model takes {what}"
                raise from_fault(Fault(e.ERROR_REASON_INPUT_MISSING, message, {"input": name}))
        return [given[name] for name in names]

    def present(self, outputs: Sequence[Buffer], time_steps: int, *, one: bool) -> Outputs:
        """The answer of one step: writable arrays, `[time, *shape]`, without the time axis where `one`.

        Raises:
            ProtocolError: the server's answer does not fit its own description of the model.
        """
        if len(outputs) != len(self.outputs):
            raise ProtocolError(f"{len(outputs)} outputs came and the model has {len(self.outputs)}")
        arrays = []
        for field, data in zip(self.outputs, outputs, strict=True):
            shape = field.shape if one or not field.has_time else (time_steps, *field.shape)
            arrays.append(decode(field, data, shape))
        return self.named(arrays)

    def named(self, arrays: Sequence[Any]) -> Outputs:
        """One output alone, several as a dict by name."""
        if len(arrays) == 1:
            return arrays[0]
        return {field.name: array for field, array in zip(self.outputs, arrays, strict=True)}


def decode(field: Field, data: Buffer, shape: tuple[int, ...]) -> Array:
    """An output's bytes as a writable array.

    Raises:
        ProtocolError: the size is not the shape's.
    """
    try:
        return np.frombuffer(bytearray(data), field.dtype).reshape(shape)
    except ValueError as error:
        raise ProtocolError(f"output {field.name!r}: {len(data)} bytes are not {field.dtype} {list(shape)}") from error


def signature_of(spec: spec_pb2.ModelSpec) -> Signature:
    """The signature of a description that came from a server.

    Raises:
        ProtocolError: a data type that this version does not know.
    """
    try:
        return Signature(spec)
    except WireError as error:
        raise ProtocolError(f"model {spec.name!r}: {error}") from error
