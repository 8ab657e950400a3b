"""A file is tried and proved: what depends on its company runs alone, and what is not the file's is not written."""

import re
from pathlib import Path

import numpy as np
import pytest
from conveyor_server.adopt.adoption import Adoption, adopt
from conveyor_server.adopt.answers import Answers, Asked, Refused
from conveyor_server.adopt.render import render
from conveyor_server.runner.base import Run, RunnerUnavailable
from conveyor_server.runner.description import Constant, Input, Output, State
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import read_step_file
from foreign import Graph, cell, lstm


def adopted(graph: Graph, folder: Path, *, example: Path | None = None, tolerance: float = 0.0, **said) -> Adoption:
    return adopt(graph.save(folder / "file.onnx"), Answers(**said), example=example, tolerance=tolerance)


def test_an_lstm_is_proved_together(tmp_path: Path) -> None:
    made = adopted(lstm(), tmp_path, time_axes={"x": 1})
    assert made.description.inputs == (Input("x", 0, 1, (4,)),)
    assert made.description.outputs == (Output("y", 0, 1, (8,)),)
    assert made.description.states == (State("h", "h", "hn", 1, (1, 8)), State("c", "c", "cn", 1, (1, 8)))
    assert (made.proof.exact, made.proof.sessions, made.proof.time_steps) == (True, 16, 160)
    assert made.proof.rows == (1, 2, 3, 5, 8, 16)
    assert (made.proof.unmoved, made.rows) == ((), "")


def test_a_fixed_batch_of_one_is_proved_row_by_row(tmp_path: Path) -> None:
    made = adopted(lstm(rows=1, time=1), tmp_path, inputs=frozenset({"x"}))
    assert made.description.batch == "one"
    assert made.proof.rows == (1,)
    assert made.description.inputs == (Input("x", 0, None, (1, 4)),)
    assert made.description.outputs == (Output("y", 0, None, (1, 8)),)


def company() -> Graph:
    """A state that takes from all rows of its run: whatever is said of axes, sessions are not independent."""
    graph = Graph()
    for name in ("x", "state"):
        graph.input(name, np.float32, ["N", 2])
    loudest = graph.node("ReduceMax", ["x"], axes=[0], keepdims=1)
    new = graph.node("Add", [graph.node("Mul", ["state", graph.weight(np.float32(0.5))]), loudest], "stateN")
    graph.output(new, np.float32, ["N", 2])
    graph.output(graph.node("Add", ["stateN", "x"], "y"), np.float32, ["N", 2])
    return graph


def test_a_file_whose_rows_are_not_independent_runs_row_by_row(tmp_path: Path) -> None:
    made = adopted(company(), tmp_path, inputs=frozenset({"x"}))
    assert made.description.batch == "one"
    assert re.fullmatch(
        r"Row by row: rows together differ from each alone by up to (\S+), and --tolerance (\S+) would accept that\.",
        made.rows,
    )
    assert (made.proof.exact, made.proof.rows) == (True, (1,))


def test_what_was_asked_for_and_does_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"what would be served is not what the file gives: .*say --tolerance"):
        adopted(company(), tmp_path, inputs=frozenset({"x"}), batch="dynamic")


def test_a_tolerance_accepts_what_is_near_enough(tmp_path: Path) -> None:
    made = adopted(company(), tmp_path, inputs=frozenset({"x"}), tolerance=100.0)
    assert made.description.batch == "dynamic"
    assert 0 < made.proof.worst < 100
    assert "differences of up to" in str(made.proof)
    assert made.rows.startswith("Accepted: ")
    assert made.rows.endswith("the last bits depend on how many they are.")


def lone() -> Graph:
    """A row alone takes another way than rows in company, which all take the same."""
    graph = Graph()
    for name in ("x", "state"):
        graph.input(name, np.float32, ["N", 2])
    rows = graph.node("Slice", [graph.node("Shape", ["x"]), graph.weight(np.array([0])), graph.weight(np.array([1]))])
    alone = graph.node("Cast", [graph.node("Equal", [rows, graph.weight(np.array([1]))])], to=1)
    nudge = graph.node("Mul", [alone, graph.weight(np.float32(1e-3))])
    halved = graph.node("Mul", ["state", graph.weight(np.float32(0.5))])
    graph.output(graph.node("Sum", [halved, "x", nudge], "stateN"), np.float32, ["N", 2])
    graph.output(graph.node("Neg", ["stateN"], "y"), np.float32, ["N", 2])
    return graph


def test_a_row_that_differs_only_where_it_is_alone_is_never_alone(tmp_path: Path) -> None:
    made = adopted(lone(), tmp_path, inputs=frozenset({"x"}))
    assert made.description.batch == "one"
    made = adopted(lone(), tmp_path, inputs=frozenset({"x"}), tolerance=0.01)
    assert made.description.batch == "company"
    assert made.proof.exact
    assert str(made.proof).endswith("and each beside an empty row in the file: the same bits")
    assert made.rows.startswith("In company: rows together differ from each alone by up to 0.00")


def test_what_is_never_alone_is_served_so(tmp_path: Path) -> None:
    made = adopted(lone(), tmp_path, inputs=frozenset({"x"}), tolerance=0.01)
    path = tmp_path / "m" / "1" / "model.onnx"
    lone().save(path)
    (tmp_path / "m" / "model.yaml").write_text(render(made.description, [], {}))
    runner = OnnxRunner(read_step_file(path), Host.of("cpu", 1), 8)
    x, one, two = np.ones((2, 1, 2), np.float32), np.arange(1), np.arange(2)
    alone = runner.step(Run(one, one, np.ones(1, bool), np.ones(1, np.int32), [x[:1]]))
    together = runner.step(Run(two, two + 2, np.ones(2, bool), np.ones(2, np.int32), [x]))
    assert alone.outputs[0].tobytes() == together.outputs[0][:1].tobytes() == np.full(2, -1, np.float32).tobytes()
    runner.close()


def test_a_row_that_is_built_into_the_graph(tmp_path: Path) -> None:
    """It says that any number of rows is taken, and reshapes to one."""
    graph = cell(["state"], ["stateN"])
    graph.node("Reshape", ["y", graph.weight(np.array([1, 1]))], "one")
    graph.output("one", np.float32, ["N", 1])
    made = adopted(graph, tmp_path, inputs=frozenset({"x"}), outputs=("one",))
    assert made.description.batch == "one"
    assert made.rows.startswith("Row by row: 3 rows in one run fail: ")


def test_an_output_without_rows_is_asked_about(tmp_path: Path) -> None:
    graph = cell(["state"], ["stateN"])
    graph.node("ReduceSum", ["y"], "all", keepdims=0)
    graph.output("all", np.float32, [])
    with pytest.raises(Asked, match=r"output 'all' is \[\] for one row and \[\] for 3, so no axis of it counts rows"):
        adopted(graph, tmp_path, inputs=frozenset({"x"}))
    made = adopted(graph, tmp_path, inputs=frozenset({"x"}), outputs=("y",))
    assert made.description.outputs == (Output("y", 0, None, (1,)),)


def test_a_state_that_is_not_given_back_as_it_came(tmp_path: Path) -> None:
    graph = cell(["state"], ["v"])
    graph.outputs = graph.outputs[1:]
    graph.node("Concat", ["v", "v"], "stateN", axis=1)
    graph.output("stateN", np.float32, ["N", "M"])
    with pytest.raises(Refused, match=r"output 'stateN' gives rows \[6\], and state 'state' takes \[3\]"):
        adopted(graph, tmp_path, inputs=frozenset({"x"}))


def test_a_state_that_never_moves_is_noticed(tmp_path: Path) -> None:
    graph = cell(["state"], ["stateN"])
    graph.input("still_state", np.float32, ["N", 1])
    graph.node("Identity", ["still_state"], "still_stateN")
    graph.output("still_stateN", np.float32, ["N", 1])
    made = adopted(graph, tmp_path, inputs=frozenset({"x"}))
    assert made.proof.unmoved == ("still_state",)


def embedding() -> Graph:
    """Token ids from 5 to 9 of a table that has no others."""
    graph = Graph()
    graph.input("token", np.int64, ["N"])
    graph.input("state", np.float32, ["N", 2])
    row = graph.node("Sub", ["token", graph.weight(np.int64(5))])
    # A negative index counts from the end; this one is out of the table.
    row = graph.node("Where", [graph.node("Less", [row, graph.weight(np.int64(0))]), graph.weight(np.int64(99)), row])
    found = graph.node("Gather", [graph.weight(np.arange(10, dtype=np.float32).reshape(5, 2)), row])
    graph.output(graph.node("Add", ["state", found], "stateN"), np.float32, ["N", 2])
    graph.output(graph.node("Identity", ["stateN"], "y"), np.float32, ["N", 2])
    return graph


def test_an_example_is_fed_where_random_values_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"the file does not run as it is described: .*[Ii]ndices"):
        adopted(embedding(), tmp_path)
    np.save(tmp_path / "tokens.npy", np.array([5, 9, 7]))
    made = adopted(embedding(), tmp_path, example=tmp_path / "tokens.npy")
    assert made.proof.exact
    np.savez(tmp_path / "tokens.npz", token=np.array([6, 8]))
    assert adopted(embedding(), tmp_path, example=tmp_path / "tokens.npz").proof.exact


def test_a_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    graph = cell(["state"], ["v"])
    graph.outputs = graph.outputs[1:]
    graph.node("Div", ["v", graph.weight(np.zeros(3, np.float32))], "stateN")
    graph.output("stateN", np.float32, ["N", 3])
    with pytest.raises(Refused, match="a state is not finite after a step, and a server refuses such steps"):
        adopted(graph, tmp_path, inputs=frozenset({"x"}))


def test_an_example_that_does_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((4, 2), np.int64))
    with pytest.raises(Refused, match=r"the example of 'token' is int64 \[4, 2\]; int64 \[time\] is wanted"):
        adopted(embedding(), tmp_path, example=tmp_path / "wrong.npy")
    np.savez(tmp_path / "wrong.npz", tokens=np.array([6]))
    with pytest.raises(Refused, match="the example has 'tokens', and the inputs are token"):
        adopted(embedding(), tmp_path, example=tmp_path / "wrong.npz")
    (tmp_path / "text.npy").write_text("no numbers")
    with pytest.raises(Refused, match=r"text\.npy cannot be read as \.npy or \.npz"):
        adopted(embedding(), tmp_path, example=tmp_path / "text.npy")


def test_constants_and_windows_are_proved(tmp_path: Path) -> None:
    graph = Graph()
    graph.input("x", np.float32, ["N", 7])
    graph.input("gain", np.float32, ["N", 1])
    graph.output(graph.node("Mul", ["x", "gain"], "y"), np.float32, ["N", 7])
    said = {"windows": {"x": (4, None)}, "constants": {"gain": Constant("gain", 3, 0)}, "stateless": True}
    made = adopted(graph, tmp_path, **said)
    assert made.description.inputs[0].shape == (3,)
    assert made.description.outputs[0].shape == (7,)
    assert made.proof.exact


def test_a_file_that_onnxruntime_does_not_load(tmp_path: Path) -> None:
    proto = lstm().proto()
    proto.graph.node[1].op_type = "NoSuchOperator"
    (tmp_path / "file.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(RunnerUnavailable, match=r"does not load file\.onnx"):
        adopt(tmp_path / "file.onnx", Answers(time_axes={"x": 1}, states={"h": "hn", "c": "cn"}))


def test_a_step_model_of_conveyors_own_is_not_adopted(tmp_path: Path) -> None:
    proto = lstm().proto()
    proto.metadata_props.add(key="conveyor.spec", value="{}")
    (tmp_path / "file.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Refused, match="was exported by Conveyor and describes itself"):
        adopt(tmp_path / "file.onnx", Answers())
