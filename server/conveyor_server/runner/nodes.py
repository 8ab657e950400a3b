"""Nodes and constants of a graph in the making, and the names in one that is made.

Invariant: names that are given here begin with the prefix that was asked for, so they meet no other graph's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from conveyor_proto.codec import Array
from onnx import TensorProto, helper, numpy_helper

from conveyor_server.runner.base import RunnerUnavailable


class Nodes:
    """Nodes and constants in the making.

    Args:
        prefix: what the names of all of them begin with.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = prefix

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node of one output, and returns the output's name: `output`, or one of its own."""
        name = f"{self._prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output or name], name=name, **attributes))
        return output or name

    def constant(self, value: Array) -> str:
        """Adds a constant, and returns its name."""
        name = f"{self._prefix}.constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every subgraph of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer or inner.output:
                    yield from graphs(inner)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: those of attributes, subgraphs and functions too."""
    for graph in graphs(proto.graph):
        yield from graph.initializer
        yield from _attribute_tensors(graph.node)
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for function in proto.functions:
        yield from tensors(onnx.ModelProto(graph=onnx.GraphProto(node=function.node)))


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a value or a node in a graph and its subgraphs."""
    found: set[str] = set()
    for inner in graphs(graph):
        for node in inner.node:
            found.update((node.name, *node.input, *node.output))
        for items in (inner.input, inner.output, inner.value_info, inner.initializer):
            found.update(item.name for item in items)
        found.update(item.values.name for item in inner.sparse_initializer)
    return found - {""}


def rename(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    """Gives values other names, in place, wherever a graph's nodes and subgraphs make or use them.

    A name is visible in subgraphs and is never given twice there, so one mapping holds for all of them. The graph's own
    inputs and outputs keep their names: they are declared anew by whoever renames.
    """
    for inner in graphs(graph):
        for node in inner.node:
            _rename_in(node.input, new)
            _rename_in(node.output, new)
        infos = list(inner.value_info)
        if inner is not graph:
            infos += [*inner.input, *inner.output]
        for info in infos:
            info.name = new.get(info.name, info.name)
        for weight in inner.initializer:
            weight.name = new.get(weight.name, weight.name)


def _rename_in(field: Any, new: Mapping[str, str]) -> None:
    for index, name in enumerate(field):
        if name in new:
            field[index] = new[name]


def axes_of(nodes: Nodes, axes: Sequence[int]) -> str:
    """A constant that names axes, as Squeeze and Unsqueeze take it."""
    return nodes.constant(np.array(axes, np.int64))


def kind_name(element: int) -> str:
    """What ONNX calls a TensorProto.DataType; a file may have numbers that are none."""
    return TensorProto.DataType.Name(element).lower() if element in TensorProto.DataType.values() else f"type {element}"


def inferred_outputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph's outputs with the shapes that its operators give them, where it does not say.

    Raises:
        RunnerUnavailable: the graph contradicts itself.
    """
    try:
        return list(onnx.shape_inference.infer_shapes(proto).graph.output)
    except Exception as error:  # what onnx raises has no common base but Exception
        raise RunnerUnavailable(f"the graph contradicts itself: {' '.join(str(error).split())[:300]}") from error
