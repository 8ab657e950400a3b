"""Small edits of ONNX graphs: names of values, named inputs and outputs, counts of operators."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import tensor_pb2
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto, helper

BATCH, TIME = "batch", "time"


def value_info(
    name: str, dtype: tensor_pb2.DataType.ValueType, shape: Sequence[int], *, timed: bool = False
) -> ValueInfoProto:
    """A graph input or output `[batch, time, *shape]`, or `[batch, *shape]`."""
    element = helper.np_dtype_to_tensor_dtype(to_numpy_dtype(dtype))
    return helper.make_tensor_value_info(name, element, [BATCH, *([TIME] if timed else []), *shape])


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, subgraphs included."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def operation_counts(graph: GraphProto) -> dict[str, int]:
    """Nodes by operator type, subgraphs included."""
    return dict(Counter(node.op_type for node in all_nodes(graph)))


def rename_values(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Renames values wherever they are made or used, subgraphs included."""
    for initializer in graph.initializer:
        initializer.name = names.get(initializer.name, initializer.name)
    for value in [*graph.input, *graph.output]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for inner in subgraphs(node):
            rename_values(inner, names)


def name_ports(graph: GraphProto, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> None:
    """Gives a graph its final inputs and outputs, in order; other values of those names make room.

    An output that is an input, a constant or another output gets an Identity of its own.
    """
    ports = {value.name for value in [*inputs, *outputs]}
    own = {value.name for value in [*graph.input, *graph.output]}
    inner = {name for node in graph.node for name in node.output} | {item.name for item in graph.initializer}
    rename_values(graph, {name: f"{name}.value" for name in inner & ports - own})
    staged = {value.name: f"port.in.{index}" for index, value in enumerate(graph.input)}
    rename_values(graph, staged)
    made = {name for node in graph.node for name in node.output}
    names = {value.name: port.name for value, port in zip(graph.input, inputs, strict=True)}
    taken: set[str] = set()
    for value, port in zip(graph.output, outputs, strict=True):
        if value.name in made and value.name not in taken:
            names[value.name] = port.name
            taken.add(value.name)
        else:
            source = names.get(value.name, value.name)
            graph.node.append(helper.make_node("Identity", [source], [port.name], name=f"output.{port.name}"))
    rename_values(graph, names)
    del graph.input[:], graph.output[:]
    graph.input.extend(inputs)
    graph.output.extend(outputs)


def strip(graph: GraphProto) -> None:
    """Drops documentation, metadata and the shapes of inner values, which tell of the machine that traced it."""
    del graph.value_info[:], graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for inner in subgraphs(node):
            strip(inner)
    for initializer in graph.initializer:
        initializer.doc_string = ""
        del initializer.metadata_props[:]


def make_model(graph: GraphProto, opset: int, ir_version: int) -> onnx.ModelProto:
    """A model of the default ONNX domain alone."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="conveyor")
    model.ir_version = ir_version
    return model
