"""Which output is found to be the new value of which input, and when it is asked instead."""

import itertools

import pytest
from conveyor_server.adopt.answers import Answers, Asked
from conveyor_server.adopt.pairing import pair
from conveyor_server.adopt.propose import Proposal, propose
from conveyor_server.runner.foreign import inputs_of, outputs_of
from conveyor_server.runner.lineage import trace
from foreign import Graph, cell, lstm


def proposed(graph: Graph, **answers) -> Proposal:
    return propose(graph.proto(), Answers(**answers))


def asked(graph: Graph, **answers) -> list[str]:
    with pytest.raises(Asked) as caught:
        propose(graph.proto(), Answers(**answers))
    return caught.value.questions


def found(graph: Graph, **answers) -> dict[str, str]:
    proto, ask = graph.proto(), []
    pairing = pair(inputs_of(proto), outputs_of(proto), trace(proto.graph), Answers(**answers), ask)
    return dict(pairing.states)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("state", "stateN"),
        ("state", "state_out"),
        ("h", "hn"),
        ("h0", "hn"),
        ("h_0", "h_n"),
        ("h_in", "h_out"),
        ("prev_hidden", "new_hidden"),
        ("past_cache_3", "present_cache_3"),
        ("cached_len_1", "new_cached_len_1"),
        ("embed_states", "new_embed_states"),
        ("encoder.rnn.cell.in", "encoder.rnn.cell.out"),
        ("inputState", "outputState"),
        ("conv_cache", "conv_cache_out"),
    ],
)
def test_names_of_one_thing_before_and_after(source: str, target: str) -> None:
    assert found(cell([source], [target]), inputs=frozenset({"x"})) == {source: target}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("audio_in", "audio_out"),  # a pair of names, and no state
        ("mix", "enh"),
        ("state", "memory"),
        ("cache_1", "new_cache_2"),
        ("encoder_state", "decoder_state"),
        ("in", "out"),
    ],
)
def test_names_that_settle_nothing_are_asked_about(source: str, target: str) -> None:
    (question,) = asked(cell([source], [target]), inputs=frozenset({"x"}))
    assert f"is input {source} float32 [N, 3] a state, and which output is its new value: {target} float32" in question
    assert f"Say --state {source}={target}; or --input {source} if clients send it" in question


def test_two_states_of_one_shape_by_the_graph_where_sorted_names_would_cross_them() -> None:
    graph = lstm(names={"h": "late", "c": "early", "hn": "a_out", "cn": "b_out"})
    by_position = dict(zip(sorted(["late", "early"]), sorted(["a_out", "b_out"]), strict=True))
    assert by_position == {"early": "a_out", "late": "b_out"}
    proposal = proposed(graph, time_axes={"x": 1})
    assert {state.input: state.output for state in proposal.description.states} == {"late": "a_out", "early": "b_out"}
    assert proposal.reasons == {"late": "the hidden state of n1", "early": "the cell state of n1"}


def test_two_states_of_one_shape_without_operators_that_tell_are_asked_about() -> None:
    graph = cell(["late", "early"], ["a_out", "b_out"])
    questions = asked(graph, inputs=frozenset({"x"}))
    assert len(questions) == 2
    for name, question in zip(("late", "early"), questions, strict=True):
        assert f"Say --state {name}=a_out or --state {name}=b_out; or --input {name}" in question
    assert found(graph, inputs=frozenset({"x"}), states={"late": "a_out", "early": "b_out"}) == {
        "late": "a_out",
        "early": "b_out",
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_names_in_the_file_says_nothing(order: tuple[int, ...]) -> None:
    names = [("b_state", "b_state_out"), ("a_state", "a_state_out"), ("c_state", "c_state_out")]
    graph = cell(["b_state", "a_state", "c_state"], ["b_state_out", "a_state_out", "c_state_out"])
    outputs = graph.outputs
    graph.outputs = [outputs[index] for index in order] + outputs[3:]
    assert found(graph, inputs=frozenset({"x"})) == dict(names)


def test_the_graph_knows_better_than_names() -> None:
    """`h` is the LSTM's cell here, whatever it is called."""
    graph = lstm(names={"h": "c", "c": "h"})
    assert found(graph, time_axes={"x": 1}) == {"c": "hn", "h": "cn"}


def test_one_output_is_not_shared_by_two_inputs() -> None:
    graph = cell(["state", "state_in"], ["state_out", "other"])
    questions = asked(graph, inputs=frozenset({"x"}))
    assert [question.split()[2] for question in questions] == ["state", "state_in"]


def test_an_output_that_is_taken_is_no_candidate() -> None:
    graph = Graph()
    for name in ("h", "other"):
        graph.input(name, "float32", ["N", 2])
    graph.output(graph.node("Add", ["h", "other"], "hn"), "float32", ["N", 2])
    graph.output(graph.node("ReduceMax", ["hn"], "y", axes=[1]), "float32", ["N", 1])
    assert found(graph) == {"h": "hn"}
    assert [item.name for item in proposed(graph).description.inputs] == ["other"]


def test_an_initial_state_whose_new_value_is_no_output() -> None:
    graph = lstm(time=1)
    graph.outputs = [item for item in graph.outputs if item.name != "cn"]
    questions = asked(graph)
    assert any("is the cell state of n1, and no output could be its new value" in question for question in questions)
    assert any("--constant c=0" in question for question in questions)


def test_a_cell_that_is_what_it_answers() -> None:
    graph = Graph()
    for name in ("h", "x"):
        graph.input(name, "float32", ["N", 2])
    graph.output(graph.node("Add", ["h", "x"], "hn"), "float32", ["N", 2])
    (question,) = asked(graph, inputs=frozenset({"x"}))
    assert "every output is the new value of a state: which of hn do clients get as well? Say --output NAME" in question
    proposal = proposed(graph, inputs=frozenset({"x"}), states={"h": "hn"}, outputs=("hn",))
    assert proposal.outputs == ("hn",)


def test_nothing_left_to_send_is_asked_about() -> None:
    graph = Graph()
    graph.input("state", "float32", ["N", 2])
    graph.output(graph.node("Identity", ["state"], "stateN"), "float32", ["N", 2])
    graph.output(graph.node("Identity", ["state"], "y"), "float32", ["N", 2])
    assert any("no input is left that clients send" in question for question in asked(graph))
