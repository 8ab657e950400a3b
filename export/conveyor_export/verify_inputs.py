"""What the verifier feeds: random inputs of unit scale, and what the user gave.

Invariant: a random integer is one that the model can take: any row of an embedding that it indexes, and otherwise a
value seen in the example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

from conveyor_export.errors import VerificationFailed
from conveyor_export.step_model import Arrays, StepModel

# Random sequences: long enough for several chunks and for a convolution's context, short enough to be cheap.
ROWS = 4
TIME_STEPS = 17
MAX_RANDOM_TIME_STEPS = 256
MAX_GIVEN_TIME_STEPS = 4096

# Nodes through which an index reaches its table unchanged in value.
_VALUE_KEEPING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch of whole sequences to verify on.

    Attributes:
        kind: `random`, `resampled`, `example` or `given`, as VerificationCase.inputs.
        inputs: ModelSpec.inputs by name, all of one batch and one time.
        batch: rows, at least 1.
        time: time steps, at least 1.
    """

    kind: str
    inputs: Arrays
    batch: int
    time: int


def random_sample(model: StepModel, rng: np.random.Generator) -> Sample:
    """Standard normal floats, fair bools, and integers that the model can take."""
    time = _random_time_steps(model)
    limits = _table_sizes(model.proto)
    arrays = {}
    for item in model.spec.inputs:
        dtype = to_numpy_dtype(item.dtype)
        shape = (ROWS, *([time] if item.has_time else []), *item.shape)
        if np.issubdtype(dtype, np.floating):
            arrays[item.name] = np.asarray(rng.standard_normal(shape), dtype)
        elif dtype == np.bool_:
            arrays[item.name] = np.asarray(rng.integers(0, 2, shape), dtype)
        elif item.name in limits:
            arrays[item.name] = np.asarray(rng.integers(0, limits[item.name], shape), dtype)
        else:
            arrays[item.name] = np.asarray(rng.choice(model.example[item.name].reshape(-1), size=shape), dtype)
    return Sample("random", arrays, ROWS, time)


def resampled(model: StepModel, random: Sample, rng: np.random.Generator) -> Sample:
    """A sample of the random one's shape whose values are all drawn from the example's."""
    arrays = {
        name: np.asarray(rng.choice(model.example[name].reshape(-1), size=array.shape), array.dtype)
        for name, array in random.inputs.items()
    }
    return Sample("resampled", arrays, random.batch, random.time)


def given_sample(spec: spec_pb2.ModelSpec, kind: str, inputs: Mapping[str, Array]) -> Sample:
    """The user's arrays, at most ROWS rows and MAX_GIVEN_TIME_STEPS time steps of them.

    Raises:
        VerificationFailed: an input is missing, has another dtype or shape than the model's, or disagrees on batch or
            time.
    """
    missing = [item.name for item in spec.inputs if item.name not in inputs]
    unknown = sorted(set(inputs) - {item.name for item in spec.inputs})
    if missing or unknown:
        expected = [item.name for item in spec.inputs]
        raise VerificationFailed(f"{kind} inputs name {sorted(inputs)}, and the model takes {expected}")
    arrays, sizes = {}, set()
    for item in spec.inputs:
        array = np.asarray(inputs[item.name])
        lead = 2 if item.has_time else 1
        dtype = to_numpy_dtype(item.dtype)
        if array.dtype != dtype or array.shape[lead:] != tuple(item.shape) or array.ndim != lead + len(item.shape):
            axes = ["batch", *(["time"] if item.has_time else []), *map(str, item.shape)]
            raise VerificationFailed(
                f"{kind} input {item.name!r} is {array.dtype} {list(array.shape)}, "
                f"and the model takes {dtype} [{', '.join(axes)}]"
            )
        sizes.add((array.shape[0], array.shape[1] if item.has_time else None))
        arrays[item.name] = array
    batches, times = {batch for batch, _ in sizes}, {time for _, time in sizes if time is not None}
    if len(batches) != 1 or len(times) != 1 or 0 in batches | times:
        raise VerificationFailed(f"{kind} inputs need one batch and one time of at least 1, and have {sorted(sizes)}")
    batch, time = min(ROWS, batches.pop()), min(MAX_GIVEN_TIME_STEPS, times.pop())
    return Sample(kind, cut(spec, arrays, slice(0, batch), time), batch, time)


def cut(spec: spec_pb2.ModelSpec, inputs: Arrays, rows: slice | Sequence[int], time: int) -> dict[str, Array]:
    """The first `time` time steps of some rows."""
    return {
        item.name: inputs[item.name][rows, :time] if item.has_time else inputs[item.name][rows] for item in spec.inputs
    }


def _random_time_steps(model: StepModel) -> int:
    contexts = [state for state in model.spec.states if state.role == spec_pb2.STATE_ROLE_CONTEXT]
    context = max((max(state.shape) for state in contexts), default=0)
    given = max(model.example[item.name].shape[1] for item in model.spec.inputs if item.has_time)
    return int(min(MAX_RANDOM_TIME_STEPS, max(TIME_STEPS, given, 2 * context)))


def _table_sizes(proto: onnx.ModelProto) -> dict[str, int]:
    """Rows of the smallest constant table that each graph input indexes, for the inputs that index one."""
    rows = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer if tensor.dims}
    origin = {item.name: item.name for item in proto.graph.input}
    sizes: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type in _VALUE_KEEPING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if node.op_type == "Gather" and axis == 0 and node.input[0] in rows and node.input[1] in origin:
            name = origin[node.input[1]]
            sizes[name] = min(sizes.get(name, rows[node.input[0]]), rows[node.input[0]])
    return sizes
