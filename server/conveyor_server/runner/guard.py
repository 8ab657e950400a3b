"""Takes out what a server never needs: a step model's guard of rows without time steps.

A step model keeps the state of a row of length 0, as `Where(lengths > 0, new, old)`. A Run's lengths are at least 1, so
the guard only copies: 3 to 6 % of a run of 256 rows. Invariant: for lengths of 1 and more nothing else changes.
"""

from collections.abc import Iterable, Sequence

import onnx
from conveyor_proto.v1 import spec_pb2
from onnx import numpy_helper

# They pass a condition on as it is.
_RESHAPES = frozenset({"Unsqueeze", "Reshape", "Squeeze", "Expand", "Identity", "Cast", "Flatten"})


def unguarded(graph: onnx.GraphProto, spec: spec_pb2.ModelSpec) -> list[str]:
    """For each state, the value that is its new state where lengths are at least 1: its output if it has no guard."""
    makers = {output: node for node in graph.node for output in node.output}
    zeros = {item.name for item in graph.initializer if _is_zero(item)}
    values = []
    for state in spec.states:
        node = makers.get(state.output_name)
        guarded = (
            node is not None
            and node.op_type == "Where"
            and node.input[2] == state.input_name
            and _asks_for_steps(node.input[0], spec.lengths_input, makers, zeros)
        )
        values.append(node.input[1] if node is not None and guarded else state.output_name)
    return values


def live(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes, in their order, that the outputs need."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    return kept[::-1]


def _is_zero(tensor: onnx.TensorProto) -> bool:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    value = numpy_helper.to_array(tensor)
    return value.size == 1 and not value.any()


def _asks_for_steps(value: str, lengths: str, makers: dict[str, onnx.NodeProto], zeros: set[str]) -> bool:
    """True where the value is `lengths > 0` in whatever shape."""
    node = makers.get(value)
    while node is not None and node.op_type in _RESHAPES:
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Greater" and node.input[0] == lengths and node.input[1] in zeros


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (output.name for output in inner.output)
            for child in inner.node:
                yield from _reads(child)
