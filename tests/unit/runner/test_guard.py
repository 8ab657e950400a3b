"""The guard of rows of length 0 is taken out where it is one, and only there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_server.runner import graph
from conveyor_server.runner.guard import live
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.step_file import read_step_file
from onnx import TensorProto, helper

Make = Callable[..., Any]


def _guarded(maker: Make, *, compare: str = "Greater", threshold: int = 0, swapped: bool = False) -> onnx.ModelProto:
    """A running sum whose new state is guarded as the exporter does it, or in another way."""
    model = maker()
    old, x, lengths = model.state("sum", [2]), model.input("x", [2]), model.lengths()
    total = model.node("ReduceSum", [x, model.weight(np.array([1]))], "total", keepdims=0)
    new = model.node("Add", [old, total], "new")
    asks = model.node(compare, [lengths, model.weight(np.int32(threshold))], "asks")
    column = model.node("Unsqueeze", [asks, model.weight(np.array([1]))], "column")
    model.node("Where", [column, old, new] if swapped else [column, new, old], "sum_out")
    model.node("Neg", [x], model.output("y", [2]))
    return model.proto()


def _operators(proto: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in proto.graph.node}


def test_the_guard_goes_and_its_nodes_with_it(maker: Make, save: Make, load: Make, one_run: Make) -> None:
    proto = _guarded(maker)
    wrapped = graph.wrap(read_step_file(save(proto)))
    assert _operators(proto) - _operators(wrapped) == {"Greater", "Unsqueeze", "Where"}
    runner: OnnxRunner = load(proto)
    runner.step(one_run([np.ones((2, 3, 2), np.float32)], [0, 1]))
    runner.step(one_run([np.ones((2, 1, 2), np.float32)], [2, 3], sources=[0, 1]))
    np.testing.assert_array_equal(runner.read_rows([2, 3])[0], np.full((2, 2), 4, np.float32))


@pytest.mark.parametrize(
    ("other", "expected"),
    [({"threshold": 1}, 0.0), ({"compare": "Less"}, 0.0), ({"swapped": True}, 0.0)],
    ids=["another threshold", "another comparison", "the other way round"],
)
def test_what_is_no_guard_stays(
    other: dict[str, Any], expected: float, maker: Make, save: Make, load: Make, one_run: Make
) -> None:
    proto = _guarded(maker, **other)
    assert "Where" in _operators(graph.wrap(read_step_file(save(proto))))
    runner: OnnxRunner = load(proto)
    runner.step(one_run([np.ones((1, 1, 2), np.float32)], [0]))
    assert (runner.read_rows([0])[0] == expected).all()


def test_a_subgraph_keeps_alive_what_it_reads_from_outside() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["b"])],
        "inner",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Abs", ["x"], ["dead"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    assert [list(node.output) for node in live(nodes, ["y"])] == [["a"], ["y"]]
