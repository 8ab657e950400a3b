"""What a graph tells of its states: which operator takes them and gives them, and nothing where it does not tell."""

import numpy as np
import onnx
import pytest
from conveyor_server.runner.lineage import Port, trace
from foreign import Graph, info, lstm
from onnx import helper


def kinds(ports: frozenset[Port]) -> list[str]:
    return sorted(f"{port.layer} {port.kind}" for port in ports)


def test_hidden_and_cell_of_one_operator() -> None:
    found = trace(lstm().proto().graph)
    assert {name: kinds(ports) for name, ports in found.takes.items()} == {"h": ["n1 hidden"], "c": ["n1 cell"]}
    assert {name: kinds(ports) for name, ports in found.ends.items()} == {"hn": ["n1 hidden"], "cn": ["n1 cell"]}
    assert kinds(found.gives["y"]) == ["n1 hidden"], "every time step's, which is no reason to take it for the last"
    assert found.successors("h") == ["hn"]
    assert (found.confirms("c", "cn"), found.denies("c", "hn"), found.denies("h", "y")) == (True, True, False)
    assert (found.confirms("x", "y"), found.denies("x", "hn")) == (False, False)


def stacked() -> onnx.GraphProto:
    """Two GRU layers whose states are one tensor `[2, N, 4]`, cut apart and joined again; no Y_h is used."""
    graph, rng = Graph(), np.random.default_rng(0)
    value = graph.input("x", np.float32, [1, "N", 4])
    graph.input("states", np.float32, [2, "N", 4])
    zero = [graph.weight(np.array([bound])) for bound in (0, 1, 2)]
    news = []
    for layer in range(2):
        old = graph.node("Slice", ["states", zero[layer], zero[layer + 1], zero[0]])
        sizes = [graph.weight(rng.standard_normal((1, 12, 4)).astype(np.float32)) for _ in range(2)]
        every = graph.node("GRU", [value, *sizes, "", "", old], f"every{layer}", hidden_size=4)
        value = graph.node("Squeeze", [every, zero[1]])
        news.append(value)
    graph.output(graph.node("Concat", news, "news", axis=0), np.float32, [2, "N", 4])
    graph.output(graph.node("Tanh", [value], "y"), np.float32, [1, "N", 4])
    return graph.proto().graph


def test_layers_whose_states_are_one_tensor() -> None:
    found = trace(stacked())
    assert len(found.takes["states"]) == 2
    assert found.successors("states") == ["news"], "of every time step, where there is no other"
    assert "y" not in found.gives, "what is computed from a state is none"


@pytest.mark.parametrize("between", ["Tanh", "Add"])
def test_what_is_computed_on_the_way_is_not_followed(between: str) -> None:
    graph = lstm()
    operands = ["h", "h"] if between == "Add" else ["h"]
    graph.nodes.insert(0, helper.make_node(between, operands, ["other"], name="between"))
    (node,) = (item for item in graph.nodes if item.op_type == "LSTM")
    node.input[5] = "other"
    assert "h" not in trace(graph.proto().graph).takes


def test_subgraphs_hide_what_they_do() -> None:
    graph = Graph()
    for name in ("h", "x"):
        graph.input(name, np.float32, ["N", 2])
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", ["h"], [f"{name}.h"])], name, [], [info(f"{name}.h", np.float32, ["N", 2])]
        )
        for name in ("then", "else")
    }
    graph.node("If", [graph.weight(np.array(True))], "hn", **branches)
    graph.output("hn", np.float32, ["N", 2])
    found = trace(graph.proto().graph)
    assert (found.takes, found.gives, found.ends) == ({}, {}, {})
