"""Which axes are found to count rows and time steps, and which are asked about."""

import numpy as np
import pytest
from conveyor_server.adopt.answers import Answers, Asked, Refused
from conveyor_server.adopt.propose import Proposal, propose
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import Constant, Window
from foreign import Graph, lstm


def graph_of(inputs: dict[str, list], outputs: dict[str, list], dtype=np.float32) -> Graph:
    """Inputs and outputs of these shapes; what is computed is nothing."""
    graph = Graph()
    for name, shape in inputs.items():
        graph.input(name, dtype, shape)
    for name, shape in outputs.items():
        graph.node("Identity", [next(iter(inputs))], name)
        graph.output(name, dtype, shape)
    return graph


def asked(graph: Graph, **answers) -> list[str]:
    with pytest.raises(Asked) as caught:
        propose(graph.proto(), Answers(**answers))
    return caught.value.questions


def proposed(graph: Graph, **answers) -> Proposal:
    return propose(graph.proto(), Answers(**answers))


def test_a_named_axis_of_rows_and_one_that_every_tensor_has() -> None:
    for symbol in ("batch", "N", "anything"):
        proposal = proposed(lstm(rows=symbol), time_axes={"x": 1})
        (x,), states = proposal.description.inputs, proposal.description.states
        assert (x.batch_axis, x.time_axis) == (0, 1)
        assert [state.batch_axis for state in states] == [1, 1]
        assert (proposal.description.batch, proposal.one_row) == ("dynamic", "")


def test_an_open_axis_beside_that_of_rows_is_asked_about() -> None:
    (question,) = asked(lstm(), inputs=frozenset({"x"}))
    assert (
        "what is axis 1 of input x float32 [N, T, 4]: time, of which a run takes one step (--time-axis x=1)" in question
    )
    assert "or of one size (--shape x=SIZES" in question
    assert proposed(lstm(), time_axes={"x": 1}).description.inputs[0].shape is None
    assert proposed(lstm(), inputs=frozenset({"x"}), shapes={"x": (7, 4)}).description.inputs[0].shape == (7, 4)


def test_open_axes_without_names_are_asked_about() -> None:
    graph = graph_of({"x": [None, None]}, {"y": [None, 1, 1]})
    assert asked(graph) == ["which axis of x [?, ?] counts rows? Say --batch-axis x=0 or --batch-axis x=1"]
    (x,) = proposed(graph, batch_axes={"x": 1}, shapes={"x": (5,)}).description.inputs
    assert (x.batch_axis, x.shape) == (1, (5,))
    (x,) = proposed(graph, time_axes={"x": 0}).description.inputs
    assert (x.batch_axis, x.time_axis) == (1, 0)


def test_what_has_no_axis_of_rows_is_the_same_for_all() -> None:
    graph = graph_of({"x": ["N", 4], "sr": []}, {"y": ["N", 3]})
    assert asked(graph) == ["sr float32 [] has no axis of rows, so it is the same for all: --constant sr=VALUE"]
    proposal = proposed(graph, constants={"sr": Constant("sr", 8000)})
    assert [item.name for item in proposal.description.inputs] == ["x"]
    assert proposal.description.constants == (Constant("sr", 8000),)


def test_a_file_that_fixes_a_tensor_runs_row_by_row() -> None:
    proposal = proposed(lstm(rows=1, time=1), inputs=frozenset({"x"}))
    assert proposal.description.batch == "one"
    assert proposal.one_row == "the file fixes x float32 [1, 1, 4], h float32 [1, 1, 8], c float32 [1, 1, 8]"
    assert [state.batch_axis for state in proposal.description.states] == [0, 0]


def test_a_window_lies_along_the_only_axis_it_can_or_is_asked_about() -> None:
    one = graph_of({"x": ["N", 9]}, {"y": ["N", 1]})
    assert proposed(one, windows={"x": (4, None)}).description.inputs[0].window == Window(4, 1)
    two = graph_of({"x": ["N", 9, 3]}, {"y": ["N", 1]})
    assert asked(two, windows={"x": (4, None)}) == [
        "along which axis of input x float32 [N, 9, 3] does its window of 4 lie? Say --window x=4@1 or --window x=4@2"
    ]
    assert proposed(two, windows={"x": (4, 2)}).description.inputs[0].window == Window(4, 2)


def test_a_state_that_grows_is_asked_about() -> None:
    graph = graph_of({"x": ["N", 4], "past_cache": ["N", "past", 4]}, {"present_cache": ["N", "now", 4], "y": ["N", 3]})
    (question,) = asked(graph)
    assert "how large is a row of state past_cache float32 [N, past, 4]? One that grows cannot be kept" in question


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"states": {"q": "hn"}}, "--state names 'q', and the graph takes x float32"),
        ({"states": {"h": "q"}}, "--state names 'q', and the graph gives y float32"),
        ({"shapes": {"q": (1,)}}, "--shape names 'q'"),
        ({"outputs": ("q",)}, "--output names 'q'"),
    ],
)
def test_answers_about_what_is_not_there(answers: dict, told: str) -> None:
    with pytest.raises(Refused, match=told):
        propose(lstm().proto(), Answers(**answers))


def test_what_cannot_be_served_is_said_first() -> None:
    graph = graph_of({"x": ["N", 4]}, {"y": ["N", 3]})
    proto = graph.proto()
    proto.graph.input[0].type.tensor_type.elem_type = 8
    with pytest.raises(RunnerUnavailable, match="input 'x' is of string"):
        propose(proto, Answers())
