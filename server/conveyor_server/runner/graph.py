"""The graph that runs: a step model wrapped so that it reads and writes rows of the slabs by itself.

    slab -> Gather(sources) -> step model -> ScatterND(destinations) -> the same slab

Invariant: a wrapped graph's outputs for the user are those of the step model; its slabs change in the rows
`destinations` only. Nothing here imports onnxruntime.
"""

import math
from collections.abc import Callable, MutableSequence, Sequence
from typing import TypeVar

import numpy as np
import onnx
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import spec_pb2
from onnx import TensorProto, helper

from conveyor_server.runner.guard import live, unguarded
from conveyor_server.runner.nodes import Nodes, graphs
from conveyor_server.runner.step_file import StepFile

_Message = TypeVar("_Message")
_PREFIX = "conveyor."
SOURCES = _PREFIX + "sources"  # int64 [batch]; a fresh row reads the row that holds the initial state
DESTINATIONS = _PREFIX + "destinations"  # int64 [batch, 1]
FINITE = _PREFIX + "finite"  # bool [1, batch]
SLOTS = _PREFIX + "slots"  # int64 [rows] of the row graphs; [rows, 1] where they scatter

# Measured on onnxruntime 1.32, CPU, float32: a row's result from these has the same bits whatever else is in the batch,
# also when the row is alone. Linear layers are in it only with a constant matrix (see `needs_company`): a packed matrix
# takes one path for every number of rows, an unpacked one a vector path for one row. So does the RNN operator.
_EXACT_ALONE = frozenset(
    """LSTM GRU Conv MatMul Gemm LayerNormalization Softmax LogSoftmax Tanh Sigmoid Relu LeakyRelu PRelu HardSigmoid
    HardSwish Gelu Erf Exp Sqrt Abs Neg Sign Floor Ceil Round Clip Add Sub Mul Div Pow Sum Min Max ReduceMax ReduceMin
    Where Equal Less Greater LessOrEqual GreaterOrEqual And Or Not Cast Identity Constant ConstantOfShape Shape Reshape
    Squeeze Unsqueeze Flatten Expand Tile Pad Transpose Concat Split Slice Gather GatherElements GatherND Range OneHot
    Dropout""".split()  # noqa: SIM905 - a list would be seventy lines
)
# Measured likewise: the last bit of these depends on where in the batch a row lies, because a vector of values and the
# rest that fills none go separate ways. No padding cures it; with rows of a multiple of 16 values most are exact.
_INEXACT = frozenset(
    {"Celu", "Cos", "Einsum", "Elu", "Log", "Mish", "ReduceMean", "ReduceSum", "Selu", "Sin", "Softplus"}
)


def slab_input(index: int) -> str:
    """The wrapped graph's input that is the slab of state `index`, `[slots, *shape]`."""
    return f"{_PREFIX}slab.{index}"


def slab_output(index: int) -> str:
    """The output that is bound to the same memory as `slab_input(index)`."""
    return f"{_PREFIX}slab.{index}.new"


def row_value(index: int) -> str:
    """The row graphs' value that holds the rows of state `index`, `[rows, *shape]`."""
    return f"{_PREFIX}rows.{index}"


def needs_company(proto: onnx.ModelProto) -> bool:
    """True where a row alone in a batch may get other bits than in company; a second row cures it."""
    matrices = {
        item.name for item in proto.graph.initializer if len(item.dims) == 2 and item.data_type == TensorProto.FLOAT
    }
    constants = {item.name for item in proto.graph.initializer} | {""}
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _EXACT_ALONE:
            return True
        if constants.issuperset(node.input):  # folded at load
            constants.update(node.output)
            matrices.update(node.output)
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] not in matrices:
            return True
    return False


def inexact_operators(proto: onnx.ModelProto) -> list[str]:
    """Operators of a model that may give a row another last bit in another company."""
    return sorted(_INEXACT.intersection(node.op_type for graph in graphs(proto.graph) for node in graph.node))


def needs_two_time_steps(proto: onnx.ModelProto) -> bool:
    """True where one time step alone gets other bits than the same step in a chunk: a convolution's last column."""
    return any(node.op_type == "Conv" for graph in graphs(proto.graph) for node in graph.node)


def wrap(file: StepFile) -> onnx.ModelProto:
    """The wrapped graph of a step model with state; the file's own graph stays as it is.

    Inputs: the model's inputs and lengths, SOURCES, DESTINATIONS and one slab per state. Outputs: the model's outputs,
    one slab per state, and FINITE if a state is floating-point.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    graph, states = model.graph, file.spec.states
    before, after = Nodes(_PREFIX + "gather"), Nodes(_PREFIX + "scatter")
    new_rows = unguarded(graph, file.spec)
    for index, (state, new) in enumerate(zip(states, new_rows, strict=True)):
        before.add("Gather", slab_input(index), SOURCES, output=state.input_name)
        after.add("ScatterND", slab_input(index), DESTINATIONS, new, output=slab_output(index))
    checked = _add_finite(after, states, new_rows)
    old_inputs, old_outputs = {item.input_name for item in states}, {item.output_name for item in states}
    graph.initializer.extend(after.constants)
    _replace(
        graph.input,
        [
            *(item for item in graph.input if item.name not in old_inputs),
            _info(SOURCES, TensorProto.INT64, ["batch"]),
            _info(DESTINATIONS, TensorProto.INT64, ["batch", 1]),
            *_slabs(states, slab_input),
        ],
    )
    _replace(
        graph.output,
        [
            *(item for item in graph.output if item.name not in old_outputs),
            *_slabs(states, slab_output),
            *([_info(FINITE, TensorProto.BOOL, [1, "batch"])] if checked else []),
        ],
    )
    nodes = [*before.nodes, *graph.node, *after.nodes]
    _replace(graph.node, live(nodes, [item.name for item in graph.output]))
    return model


def has_finite(spec: spec_pb2.ModelSpec) -> bool:
    """True where a wrapped graph has the output FINITE. Integers and booleans are always finite."""
    return any(to_numpy_dtype(state.dtype).kind == "f" for state in spec.states)


def gather_rows(spec: spec_pb2.ModelSpec) -> onnx.ModelProto:
    """Row graph: the slabs and SLOTS `[rows]` in, the rows of each state out."""
    nodes = Nodes(_PREFIX + "rows")
    for index in range(len(spec.states)):
        nodes.add("Gather", slab_input(index), SLOTS, output=row_value(index))
    inputs = [*_slabs(spec.states, slab_input), _info(SLOTS, TensorProto.INT64, ["rows"])]
    return _model(nodes, inputs, _rows(spec.states))


def scatter_rows(spec: spec_pb2.ModelSpec) -> onnx.ModelProto:
    """Row graph: the slabs, SLOTS `[rows, 1]` and the rows of each state in, the slabs out."""
    nodes = Nodes(_PREFIX + "rows")
    for index in range(len(spec.states)):
        nodes.add("ScatterND", slab_input(index), SLOTS, row_value(index), output=slab_output(index))
    inputs = [*_slabs(spec.states, slab_input), _info(SLOTS, TensorProto.INT64, ["rows", 1]), *_rows(spec.states)]
    return _model(nodes, inputs, _slabs(spec.states, slab_output))


def _add_finite(nodes: Nodes, states: Sequence[spec_pb2.StateSpec], new_rows: Sequence[str]) -> bool:
    """Adds FINITE: 0 * x summed over a row is 0 where x is finite, and NaN where it is not.

    As the product of a row of zeros with the rows it costs 2 to 5 us for 256 rows of 256, an eighth of isfinite.
    """
    sums = []
    for state, new in zip(states, new_rows, strict=True):
        dtype = to_numpy_dtype(state.dtype)
        if dtype.kind != "f":
            continue
        flat = new if len(state.shape) == 1 else nodes.add("Flatten", new, axis=1)
        if dtype == np.float16:
            flat, dtype = nodes.add("Cast", flat, to=TensorProto.FLOAT), np.dtype(np.float32)
        zeros = nodes.constant(np.zeros((1, math.prod(state.shape)), dtype))
        total = nodes.add("Gemm", zeros, flat, transB=1)
        sums.append(total if dtype == np.float32 else nodes.add("Cast", total, to=TensorProto.FLOAT))
    if sums:
        total = sums[0] if len(sums) == 1 else nodes.add("Sum", *sums)
        nodes.add("Equal", total, nodes.constant(np.zeros((), np.float32)), output=FINITE)
    return bool(sums)


def _info(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def _slabs(states: Sequence[spec_pb2.StateSpec], name: Callable[[int], str]) -> list[onnx.ValueInfoProto]:
    return [_info(name(index), _element(state), ["slots", *state.shape]) for index, state in enumerate(states)]


def _rows(states: Sequence[spec_pb2.StateSpec]) -> list[onnx.ValueInfoProto]:
    return [_info(row_value(index), _element(state), ["rows", *state.shape]) for index, state in enumerate(states)]


def _element(state: spec_pb2.StateSpec) -> int:
    return helper.np_dtype_to_tensor_dtype(to_numpy_dtype(state.dtype))


def _model(
    nodes: Nodes, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes.nodes, "rows", inputs, outputs, nodes.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _replace(field: MutableSequence[_Message], items: Sequence[_Message]) -> None:
    kept = list(items)
    del field[:]
    field.extend(kept)
