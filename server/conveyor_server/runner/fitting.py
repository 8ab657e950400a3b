"""Whether a description fits its graph: every name is there, every size is known, every pair of states can be one.

Invariant: a Fitted speaks of every input of its graph, once. States are paired as described and never otherwise, and a
pair that the graph itself denies is refused: an LSTM's hidden state is never given back to it as its cell.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2

from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import Batch, Constant, Description, Input, Output, Start, State, Value
from conveyor_server.runner.foreign import Dim, Tensor, agree, inputs_of, outputs_of
from conveyor_server.runner.layout import Layout, lay_out
from conveyor_server.runner.lineage import Lineage, trace

_ROLES = {
    frozenset({"hidden"}): spec_pb2.STATE_ROLE_HIDDEN,
    frozenset({"cell"}): spec_pb2.STATE_ROLE_CELL,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A state, where it lies, and what of it the graph tells.

    Attributes:
        state: as described.
        layout: of the graph's input and output; it has no time axis.
        initial: a fresh session's row, `[*shape]`.
        role: what it remembers.
        layer: the recurrent operator that it belongs to; empty where the graph does not tell, or tells of several.
    """

    state: State
    layout: Layout
    initial: Array
    role: spec_pb2.StateRole.ValueType
    layer: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """A description that fits its graph.

    Attributes:
        description: as it was read.
        inputs: what clients send, in the graph's order.
        outputs: what clients get, in the graph's order.
        pairs: the states, in the order of the description.
        constants: graph input -> the tensor; where rows repeat it, of one row, with a batch axis of size 1.
        starts: graph input, without a time axis, with its row in a session's first time step and in later ones.
    """

    description: Description
    inputs: Sequence[Layout]
    outputs: Sequence[Layout]
    pairs: Sequence[Pair]
    constants: Mapping[str, Array]
    starts: Sequence[tuple[Layout, Array, Array]]


def fit(proto: onnx.ModelProto, description: Description) -> Fitted:
    """Checks a description against a graph.

    Args:
        proto: the file's own graph.
        description: of it.

    Raises:
        RunnerUnavailable: they disagree, or something that the graph takes is not described; the message says what to
            write instead.
    """
    inputs, outputs, batch = inputs_of(proto), outputs_of(proto), description.batch
    _check_names(description, inputs, outputs)
    lineage = trace(proto.graph)
    by_input = {item.name: item for item in description.inputs}
    by_output = {item.name: item for item in description.outputs}
    return Fitted(
        description,
        [_lay_out(inputs[name], batch, by_input[name]) for name in inputs if name in by_input],
        [_lay_out(outputs[name], batch, by_output[name]) for name in outputs if name in by_output],
        [_pair(item, inputs[item.input], outputs[item.output], batch, lineage) for item in description.states],
        {item.name: _constant(inputs[item.name], item, batch) for item in description.constants},
        [_start(inputs[item.name], item, batch) for item in description.starts],
    )


def _check_names(description: Description, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    taken = [
        *(item.name for item in description.inputs),
        *(item.input for item in description.states),
        *(item.name for item in description.constants),
        *(item.name for item in description.starts),
    ]
    given = [*(item.name for item in description.outputs), *(item.output for item in description.states)]
    for what, said, there in (("input", taken, inputs), ("output", given, outputs)):
        for name in said:
            if name not in there:
                raise RunnerUnavailable(f"the graph has no {what} {name!r}; {_nearest(name, there)}")
    left = [str(tensor) for name, tensor in inputs.items() if name not in taken]
    if left:
        raise RunnerUnavailable(
            f"the graph takes {', '.join(left)}, of which nothing is said: it is one of inputs, states, constants and "
            "starts"
        )
    for name in inputs:
        if name in outputs:
            raise RunnerUnavailable(f"{name!r} is an input and an output of the graph at once: rename one of the two")


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"


def _lay_out(tensor: Tensor, batch: Batch, item: Input | Output) -> Layout:
    window = item.window if isinstance(item, Input) else None
    return lay_out(tensor, batch, batch_axis=item.batch_axis, time_axis=item.time_axis, shape=item.shape, window=window)


def _pair(state: State, source: Tensor, target: Tensor, batch: Batch, lineage: Lineage) -> Pair:
    where = f"state {state.name!r}: {source} and {target}"
    if source.dtype != target.dtype:
        raise RunnerUnavailable(f"{where} are of two dtypes: a state is given back as it came; pair it with another")
    if source.dims is not None and target.dims is not None and not agree(source.dims, target.dims):
        raise RunnerUnavailable(f"{where} are of two shapes: a state is given back as it came; pair it with another")
    if lineage.denies(state.input, state.output):
        raise RunnerUnavailable(_denied(state, lineage))
    tensor = Tensor(source.name, source.dtype, _merged(source.dims, target.dims))
    layout = lay_out(tensor, batch, batch_axis=state.batch_axis, shape=state.shape)
    ports = lineage.takes.get(state.input, frozenset())
    layers = {port.layer for port in ports}
    return Pair(
        state,
        layout,
        row_of(state.initial, layout, f"state {state.name!r}: initial"),
        _ROLES.get(frozenset(port.kind for port in ports), spec_pb2.STATE_ROLE_CUSTOM),
        layers.pop() if len(layers) == 1 else "",
    )


def _denied(state: State, lineage: Lineage) -> str:
    takes = " and ".join(sorted(map(str, lineage.takes[state.input])))
    gives = " and ".join(sorted(map(str, lineage.gives[state.output])))
    right = lineage.successors(state.input)
    advice = f"pair it with {' or '.join(map(repr, right))}" if right else "pair it with another output"
    return (
        f"state {state.name!r} is not paired as the graph uses it: input {state.input!r} is {takes}, and output "
        f"{state.output!r} is {gives}; {advice}"
    )


def _merged(one: tuple[Dim, ...] | None, other: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    if one is None or other is None:
        return one if other is None else other
    return tuple(first if isinstance(first, int) else second for first, second in zip(one, other, strict=True))


def _constant(tensor: Tensor, constant: Constant, batch: Batch) -> Array:
    where, axis = f"constant {constant.name!r}", constant.batch_axis
    dims = tensor.dims
    if axis is not None:
        if dims is None or axis >= len(dims):
            raise RunnerUnavailable(f"{where}: {tensor} has no axis {axis}")
        if isinstance(dims[axis], int) and (dims[axis] != 1 or batch != "one"):
            raise RunnerUnavailable(f"{where}: {tensor} has a fixed axis {axis}, which cannot count the rows of a run")
        dims = (*dims[:axis], *dims[axis + 1 :])
    value = numbers(constant.value, tensor.dtype, where)
    if value.ndim == 0 and dims:
        if not all(isinstance(dim, int) for dim in dims):
            raise RunnerUnavailable(
                f"{where}: {tensor} has an open axis: say which counts rows, as in {{value: {constant.value}, "
                "batch_axis: 0}, or write the whole value as a list"
            )
        value = np.full([int(str(dim)) for dim in dims], value)
    if dims is not None and not agree(dims, value.shape):
        raise RunnerUnavailable(f"{where}: {tensor} takes another shape than {list(value.shape)}")
    return value if axis is None else np.expand_dims(value, axis)


def _start(tensor: Tensor, start: Start, batch: Batch) -> tuple[Layout, Array, Array]:
    layout = lay_out(tensor, batch, batch_axis=start.batch_axis)
    where = f"start {start.name!r}"
    return layout, row_of(start.first, layout, f"{where}: first"), row_of(start.later, layout, f"{where}: later")


def row_of(value: Value, layout: Layout, where: str) -> Array:
    """A row `[*shape]` of a layout: a number in all of it, or the row itself.

    Args:
        value: as described.
        layout: of the state.
        where: what messages call it.

    Raises:
        RunnerUnavailable: it is a list of another shape, or of numbers that the dtype does not hold.
    """
    row = numbers(value, layout.dtype, where)
    if row.ndim == 0:
        return np.full(layout.shape, row)
    if row.shape != layout.shape:
        raise RunnerUnavailable(f"{where} has shape {list(row.shape)}, and a row has {list(layout.shape)}")
    return row


def numbers(value: Value, dtype: np.dtype[np.generic], where: str) -> Array:
    """The array of a number or of nested lists of them.

    Args:
        value: as described.
        dtype: of the array.
        where: what messages call it.

    Raises:
        RunnerUnavailable: the lists are of different lengths, or the dtype does not hold the numbers.
    """
    try:
        plain = np.array(value)
    except (ValueError, OverflowError):
        raise RunnerUnavailable(f"{where}: its lists are of different lengths, or its numbers are too large") from None
    if plain.dtype.kind not in "biuf":
        raise RunnerUnavailable(f"{where}: its numbers are too large")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = plain.astype(dtype)
    exact = np.isfinite(cast).all() if dtype.kind == "f" else np.array_equal(cast, plain)
    if not exact:
        raise RunnerUnavailable(f"{where}: {dtype} does not hold {value!r:.80}")
    return cast
