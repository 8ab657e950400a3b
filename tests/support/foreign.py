"""ONNX files as others make them: states anywhere, batch anywhere, any of several opsets; and where a server looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

IR_BY_OPSET = {14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 12}


def info(name: str, dtype: Any, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


@dataclass
class Graph:
    """A graph in the making, inputs and outputs named as its maker likes."""

    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    made: int = 0

    def node(self, op_type: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        names = outputs or (f"v{self.made}",)
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"n{self.made}", **attributes))
        self.made += 1
        return names[0]

    def weight(self, value: Any, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def input(self, name: str, dtype: Any, shape: Sequence[int | str | None] | None) -> str:
        self.inputs.append(info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Sequence[int | str | None] | None) -> str:
        self.outputs.append(info(name, dtype, shape))
        return name

    def proto(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "foreign", self.inputs, self.outputs, self.weights)
        imports = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_BY_OPSET[self.opset])
        onnx.checker.check_model(model)
        return model

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(self.proto(), path)
        return path


def lstm(
    *,
    names: dict[str, str] | None = None,
    hidden: int = 8,
    size: int = 4,
    rows: int | str = "N",
    time: int | str = "T",
    opset: int = 17,
    seed: int = 0,
) -> Graph:
    """`x [rows, time, size]`, `h`, `c` `[1, rows, hidden]` -> `y [rows, time, hidden]`, `hn`, `cn`; named otherwise.

    Args:
        names: of x, h, c, y, hn and cn, where they are to be others.
        hidden: units.
        size: features.
        rows: dimension of the rows.
        time: dimension of the time steps.
        opset: of the file.
        seed: of the weights.
    """
    called = {name: (names or {}).get(name, name) for name in ("x", "h", "c", "y", "hn", "cn")}
    rng, graph = np.random.default_rng(seed), Graph(opset)
    graph.input(called["x"], np.float32, [rows, time, size])
    for name in ("h", "c"):
        graph.input(called[name], np.float32, [1, rows, hidden])
    weights = [
        graph.weight(rng.uniform(-0.5, 0.5, (1, 4 * hidden, columns)).astype(np.float32)) for columns in (size, hidden)
    ]
    bias = graph.weight(rng.uniform(-0.5, 0.5, (1, 8 * hidden)).astype(np.float32))
    x = graph.node("Transpose", [called["x"]], perm=[1, 0, 2])
    operands = [x, *weights, bias, "", called["h"], called["c"]]
    y = graph.node("LSTM", operands, "all", called["hn"], called["cn"], hidden_size=hidden)
    one_direction = graph.node("Squeeze", [y, graph.weight(np.array([1]))])
    graph.node("Transpose", [one_direction], called["y"], perm=[1, 0, 2])
    graph.output(called["y"], np.float32, [rows, time, hidden])
    for name in ("hn", "cn"):
        graph.output(called[name], np.float32, [1, rows, hidden])
    return graph


def cell(names: Sequence[str], news: Sequence[str], *, size: int = 3) -> Graph:
    """A step without recurrent operators: each state decays at a pace of its own, and `y` is told from all of them.

    Args:
        names: of the states' inputs, all `[N, size]`.
        news: of their new values, in the same order.
        size: of a row.
    """
    graph = Graph()
    x = graph.input("x", np.float32, ["N", 1])
    total = x
    for index, (name, new) in enumerate(zip(names, news, strict=True)):
        graph.input(name, np.float32, ["N", size])
        kept = graph.node("Mul", [name, graph.weight(np.float32(0.5 + 0.4 * index))])
        graph.node("Add", [kept, x], new)
        graph.output(new, np.float32, ["N", size])
        first = graph.node("Slice", [new, *(graph.weight(np.array([bound])) for bound in (0, 1, 1))])
        total = graph.node("Add", [total, first])
    graph.node("Identity", [total], "y")
    graph.output("y", np.float32, ["N", 1])
    return graph


def repository(folder: Path, graph: Graph, text: str, name: str = "m") -> Path:
    """Puts a graph and its model.yaml where a server looks: FOLDER/NAME/1/model.onnx. Returns the model's file."""
    path = graph.save(folder / name / "1" / "model.onnx")
    if text:
        (folder / name / "model.yaml").write_text(text)
    return path
