"""Files that Conveyor did not export, as they are served: what only some of them have, and what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conveyor_proto.v1 import spec_pb2
from conveyor_server.runner.base import Run, RunnerUnavailable
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import read_step_file
from foreign import Graph, cell, info, lstm, repository
from onnx import helper

LSTM = """
conveyor: 1
inputs: {x: {batch_axis: 0, time_axis: 1}}
outputs: {y: {batch_axis: 0, time_axis: 1}}
states:
  - {input: h, output: hn, batch_axis: 1}
  - {input: c, output: cn, batch_axis: 1}
"""
CELL = """
conveyor: 1
inputs: {x: {batch_axis: 0}}
outputs: {y: {batch_axis: 0}}
states: [{input: a, output: b, batch_axis: 0}]
"""


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    """Opens what a server would: a graph with its model.yaml."""
    opened: list[OnnxRunner] = []

    def make(graph: Graph, text: str) -> OnnxRunner:
        runner = OnnxRunner(read_step_file(repository(tmp_path, graph, text)), Host.of("cpu", 1), 16)
        opened.append(runner)
        return runner

    yield make
    for runner in opened:
        runner.close()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Graph, str], str]:
    """Why a graph with such a model.yaml is not served."""

    def ask(graph: Graph, text: str) -> str:
        with pytest.raises(RunnerUnavailable) as caught:
            read_step_file(repository(tmp_path, graph, text))
        return str(caught.value)

    return ask


def stepped(runner: OnnxRunner, *steps: np.ndarray) -> list[np.ndarray]:
    """Outputs `[rows, *shape]` of steps `[rows, *shape]`; a session in slot r goes to slot 8 + r and back."""
    answers = []
    for index, step in enumerate(steps):
        rows = np.arange(len(step))
        sources, destinations = (rows, rows + 8) if index % 2 else (rows + 8, rows)
        fresh, lengths = np.full(len(step), index == 0), np.ones(len(step), np.int32)
        answers.append(runner.step(Run(sources, destinations, fresh, lengths, [step[:, np.newaxis]])).outputs[0][:, 0])
    return answers


def test_an_lstm_whose_rows_are_the_second_axis_of_its_states(serve, tmp_path: Path) -> None:
    runner = serve(lstm(), LSTM)
    steps = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    served = np.array(stepped(runner, *steps))
    file = ort.InferenceSession(tmp_path / "m" / "1" / "model.onnx")
    for row in range(3):
        h = c = np.zeros((1, 1, 8), np.float32)
        for index, step in enumerate(steps):
            y, h, c = file.run(["y", "hn", "cn"], {"x": step[row][np.newaxis, np.newaxis], "h": h, "c": c})
            assert served[index, row].tobytes() == y[0, 0].tobytes()
    spec = runner.spec
    assert [(state.name, list(state.shape), state.role, state.layer) for state in spec.states] == [
        ("h", [1, 8], spec_pb2.STATE_ROLE_HIDDEN, "n1"),
        ("c", [1, 8], spec_pb2.STATE_ROLE_CELL, "n1"),
    ]
    (layer,) = spec.layers
    assert (layer.kind, layer.input_size, layer.hidden_size) == (spec_pb2.LAYER_KIND_LSTM, 4, 8)
    assert spec.operations == {"LSTM": 1, "Transpose": 2, "Squeeze": 1}
    assert (spec.provenance.form, spec.provenance.opset) == ("adopted", 17)
    assert spec.provenance.parameters == 4 * 8 * (4 + 8) + 8 * 8
    assert (spec.max_rows, spec.max_time_steps_per_run, spec.lengths_input) == (0, 1, "")


def test_what_is_known_of_weights_that_are_nodes(serve) -> None:
    graph = lstm()
    constants = [helper.make_node("Constant", [], [item.name], value=item) for item in graph.weights]
    graph.weights, graph.nodes[:0] = [], constants
    spec = serve(graph, LSTM).spec
    assert spec.provenance.parameters == 4 * 8 * (4 + 8) + 8 * 8
    assert (spec.layers[0].input_size, spec.layers[0].hidden_size) == (4, 8)


def test_states_of_one_shape_are_never_crossed(refused) -> None:
    """Paired by their sorted names, these two would be given back to each other."""
    graph = lstm(names={"h": "late", "c": "early", "hn": "a_out", "cn": "b_out"})
    assert (sorted(["late", "early"]), sorted(["a_out", "b_out"])) == (["early", "late"], ["a_out", "b_out"])
    crossed = LSTM.replace("input: h, output: hn", "input: early, output: a_out")
    crossed = crossed.replace("input: c, output: cn", "input: late, output: b_out")
    assert refused(graph, crossed) == (
        "model.yaml does not fit model.onnx: state 'early' is not paired as the graph uses it: input 'early' is the "
        "cell state of n1, and output 'a_out' is the hidden state of n1; pair it with 'b_out'"
    )


def test_the_hidden_state_as_every_steps_answer(serve) -> None:
    """What a state goes on with may be what clients get, too."""
    graph = Graph()
    total = graph.node("Add", [graph.input("s", np.float32, ["N", 2]), graph.input("x", np.float32, ["N", 2])], "sum")
    graph.output(total, np.float32, ["N", 2])
    text = "conveyor: 1\ninputs: {x: {batch_axis: 0}}\noutputs: {sum: {batch_axis: 0}}\n"
    runner = serve(graph, text + "states: [{input: s, output: sum, batch_axis: 0, initial: [1, 2]}]")
    steps = np.ones((3, 2, 2), np.float32)
    assert np.array(stepped(runner, *steps))[:, 0].tolist() == [[2, 3], [3, 4], [4, 5]]


def test_an_if_at_the_top_whose_branches_read_inputs_from_outside(serve) -> None:
    graph = Graph()
    state = graph.input("state", np.float32, [2, "N"])
    graph.input("rate", np.int64, [])
    for name in ("x", "offset"):
        graph.input(name, np.float32, ["N", 2])
    is_fast = graph.node("Equal", ["rate", graph.weight(np.int64(16000))])

    def branch(name: str, op_type: str) -> onnx.GraphProto:
        turned = helper.make_node("Transpose", [state], [f"{name}.turned"], perm=[1, 0])
        nodes = [turned, helper.make_node(op_type, ["x", f"{name}.turned"], [f"{name}.sum"])]
        nodes.append(helper.make_node("Transpose", [f"{name}.sum"], [f"{name}.new"], perm=[1, 0]))
        return helper.make_graph(nodes, name, [], [info(f"{name}.new", np.float32, [2, "N"])])

    graph.node("If", [is_fast], "new", then_branch=branch("fast", "Add"), else_branch=branch("slow", "Sub"))
    graph.output("new", np.float32, [None, None])
    turned = graph.node("Transpose", ["new"], perm=[1, 0])
    graph.output(graph.node("Add", [turned, "offset"], "y"), np.float32, ["N", 2])
    text = """
conveyor: 1
inputs: {x: {batch_axis: 0}}
outputs: {y: {batch_axis: 0}}
states: [{input: state, output: new, batch_axis: 1}]
constants: {rate: RATE, offset: {value: [0, 10], batch_axis: 0}}
"""
    steps = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.float32)
    fast = stepped(serve(graph, text.replace("RATE", "16000")), *steps)
    assert np.array(fast).tolist() == [[[1, 12], [3, 14]], [[6, 18], [10, 22]]]
    slow = stepped(serve(graph, text.replace("RATE", "8000")), *steps)
    assert np.array(slow).tolist() == [[[1, 12], [3, 14]], [[4, 14], [4, 14]]]


def test_a_file_with_a_fixed_batch_of_one_runs_row_by_row(serve, caplog) -> None:
    with caplog.at_level(logging.INFO):
        runner = serve(lstm(rows=1, time=1), "batch: one" + LSTM)
    assert "row by row, because it says `batch: one`" in caplog.text
    assert runner.spec.max_rows == 1
    steps = np.random.default_rng(0).standard_normal((3, 1, 4)).astype(np.float32)
    together = stepped(serve(lstm(), LSTM), *np.repeat(steps, 2, axis=1))
    assert np.array(stepped(runner, *steps))[:, 0].tobytes() == np.array(together)[:, 1].tobytes()


def test_weights_beside_the_file(tmp_path: Path, serve) -> None:
    inline = np.array(stepped(serve(lstm(hidden=16), LSTM), np.ones((2, 4), np.float32)))
    path = tmp_path / "beside" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(lstm(hidden=16).proto(), path, save_as_external_data=True, location="w.bin", size_threshold=64)
    (tmp_path / "beside" / "model.yaml").write_text(LSTM)
    file = read_step_file(path)
    runner = OnnxRunner(file, Host.of("cpu", 1), 16)
    assert np.array(stepped(runner, np.ones((2, 4), np.float32))).tobytes() == inline.tobytes()
    runner.close()
    content = bytearray((path.parent / "w.bin").read_bytes())
    content[5] ^= 1
    (path.parent / "w.bin").write_bytes(content)
    assert read_step_file(path).spec.digest != file.spec.digest, "the digest is of the weights too"
    (path.parent / "w.bin").unlink()
    with pytest.raises(RunnerUnavailable, match=r"weights file 'w\.bin' is missing"):
        read_step_file(path)


def test_the_first_time_step_is_told_from_later_ones(serve) -> None:
    """A graph that resets its own state at a sequence's start, as Triton's control inputs have it."""
    graph = Graph()
    begins = graph.node("Cast", [graph.input("START", np.float32, ["N", 1])], to=9)
    old = graph.input("s", np.float32, ["N", 1])
    kept = graph.node("Where", [begins, graph.weight(np.float32(100)), old])
    graph.output(graph.node("Add", [kept, graph.input("x", np.float32, ["N", 1])], "t"), np.float32, ["N", 1])
    graph.output(graph.node("Identity", ["t"], "y"), np.float32, ["N", 1])
    text = CELL.replace("input: a, output: b", "input: s, output: t")
    runner = serve(graph, text + "starts: {START: {batch_axis: 0}}")
    assert np.array(stepped(runner, *np.ones((3, 2, 1), np.float32)))[:, 1, 0].tolist() == [101, 102, 103]
    assert [state.name for state in runner.spec.states] == ["s", "START"]


def test_the_digest_is_of_everything_that_makes_an_answer(tmp_path: Path) -> None:
    texts = {
        "plain": CELL,
        "again": CELL.replace("conveyor: 1", "conveyor: 1\nbatch: dynamic"),
        "initial": CELL.replace("output: b", "output: b, initial: 1"),
        "named": CELL.replace("output: b", "output: b, name: memory"),
    }
    digests = {
        name: read_step_file(repository(tmp_path, cell("a", "b"), text, name)).spec.digest
        for name, text in texts.items()
    }
    assert digests["plain"] == digests["again"]
    assert len(set(digests.values())) == 3
    assert all(len(digest) == 64 for digest in digests.values())


def _two_dtypes() -> Graph:
    graph = cell("a", "b")
    graph.outputs = [info("double", np.float64, ["N", 3]), *graph.outputs]
    graph.node("Cast", ["b"], "double", to=11)
    return graph


@pytest.mark.parametrize(
    ("graph", "change", "told"),
    [
        (cell("a", "b"), ("x:", "xx:"), "the graph has no input 'xx'; did you mean 'x'?"),
        (cell("a", "b"), ("y:", "loud:"), "the graph has no output 'loud'; it has b, y"),
        (cell("a", "b"), ("input: a", "input: q"), "the graph has no input 'q'; it has x, a"),
        (cell("ac", "bd"), ("", ""), "the graph takes c float32 [N, 3], of which nothing is said"),
        (cell("a", "b"), ("output: b", "output: y"), "are of two shapes"),
        (_two_dtypes(), ("output: b", "output: double"), "are of two dtypes"),
        (cell("a", "b"), ("output: b", "output: b, initial: [1, 2]"), "initial has shape [2], and a row has [3]"),
        (cell("a", "b"), ("output: b", "output: b, initial: 1.0e+39"), "float32 does not hold 1e+39"),
        (cell("a", "b"), ("output: b", "output: b, initial: [[1], [1, 2]]"), "lists are of different lengths"),
        (cell("a", "b"), ("{x: {batch_axis: 0", "{x: {batch_axis: 2"), "has 2 axes, x float32 [N, 1]: axis 2 is none"),
        (cell("a", "b"), ("{x: {batch_axis: 0", "{x: {batch_axis: 1"), "axis 1 is fixed at 1, so a run is one row"),
        (cell("a", "b"), ("output: b, batch_axis: 0", "output: b, batch_axis: 1"), "axis 1 is fixed at 3 and cannot"),
        (cell("a", "b"), ("output: b", "output: b, shape: [4]"), "its axis 1 is 3, and 4 was said"),
        (cell("a", "b"), ("output: b", "output: b, shape: [3, 3]"), "is not of its 1 axes beside those of rows"),
        (cell("a", "b"), ("{x: {", "{x: {window: {size: 1, axis: 1}, "), "a window of 1 leaves nothing of axis 1"),
        (lstm(), ("", ""), "the graph has no input 'a'"),
    ],
)
def test_what_does_not_fit_is_said(graph: Graph, change: tuple[str, str], told: str, refused) -> None:
    assert told in refused(graph, CELL.replace(*change) if change[0] else CELL)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ((", time_axis: 1}}\noutputs", "}}\noutputs"), "the file leaves axis 1 open; say the `shape` of one time step"),
        (("{x: {", "{x: {shape: [5], "), "its axis 2 is 4, and 5 was said"),
    ],
)
def test_open_axes_are_never_guessed(change: tuple[str, str], told: str, refused) -> None:
    assert told in refused(lstm(), LSTM.replace(*change))


def test_a_chunk_of_fixed_length_is_no_time_axis(refused) -> None:
    told = refused(lstm(time=45), LSTM)
    assert "axis 1 is fixed at 45, and a run has one time step; a chunk of a fixed length is the `shape`" in told


def test_constants_of_open_shape_are_asked_for(refused) -> None:
    graph = cell("a", "b")
    graph.input("lens", np.int64, ["N"])
    assert "has an open axis: say which counts rows" in refused(graph, CELL + "constants: {lens: 45}")
    assert "int64 does not hold 1.5" in refused(graph, CELL + "constants: {lens: {value: 1.5, batch_axis: 0}}")
    assert "has no axis 3" in refused(graph, CELL + "constants: {lens: {value: 1, batch_axis: 3}}")


def test_inputs_that_no_client_can_send(refused) -> None:
    graph = cell("a", "b")
    graph.inputs.append(helper.make_tensor_value_info("word", onnx.TensorProto.STRING, ["N"]))
    assert "input 'word' is of string, which cannot be sent or kept as state" in refused(graph, CELL)
    graph = cell("a", "b")
    graph.inputs.append(helper.make_tensor_sequence_value_info("list", onnx.TensorProto.FLOAT, None))
    assert "input 'list' is not a tensor" in refused(graph, CELL)


class TestWithoutDescription:
    """A file alone: served where it plainly has no state."""

    @staticmethod
    def dense(rows: int | str = "N", size: int | str = 4, wide: int | str = 2) -> Graph:
        graph = Graph()
        x = graph.input("x", np.float32, [rows, size])
        weights = graph.weight(np.arange(8, dtype=np.float32).reshape(4, 2))
        graph.output(graph.node("MatMul", [x, weights], "y"), np.float64 if wide == "K" else np.float32, [rows, wide])
        return graph

    def test_without_state_it_is_served(self, serve, caplog) -> None:
        with caplog.at_level(logging.INFO):
            runner = serve(self.dense(), "")
        assert "m: has no model.yaml and no output that could be a state, so it is served without state" in caplog.text
        assert not runner.spec.states
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        (y,) = stepped(runner, x)
        assert y.tolist() == (x @ np.arange(8).reshape(4, 2)).tolist()

    @pytest.mark.parametrize(
        ("graph", "why"),
        [
            (cell("a", "b"), "b float32 [N, 3] could be the new value of a float32 [N, 3]"),
            (dense(rows=1), "does not say plainly which axis of x float32 [1, 4] counts rows"),
            (dense(size="K"), "y float32 [N, 2] could be the new value of x float32 [N, K]"),
            (dense(rows="N", size=4, wide="K"), "which axis of y float64 [N, K] counts rows, and how large a row is"),
            (lstm(names={"y": "z"}, size=8), "it may have state"),
        ],
    )
    def test_whatever_could_be_otherwise_is_refused(self, graph: Graph, why: str, refused) -> None:
        told = refused(graph, "")
        assert "model.onnx has no conveyor.spec: make it with `conveyor export`" in told
        assert why in told
        assert "write its model.yaml with `conveyor adopt m/1/model.onnx`, from the folder of the models" in told

    def test_a_recurrent_operator_without_state_is_refused(self, refused) -> None:
        graph = lstm(time=9)
        graph.inputs, graph.outputs = graph.inputs[:1], graph.outputs[:1]
        operands = graph.nodes[1].input
        del operands[5:]
        assert "has recurrent operators, and may forget what it should not" in refused(graph, "")
