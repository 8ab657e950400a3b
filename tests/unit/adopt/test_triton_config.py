"""A Triton configuration becomes a model.yaml: states by the names it gives, controls where they mean something."""

from pathlib import Path

import numpy as np
import pytest
from conveyor_server.adopt.answers import Refused
from conveyor_server.adopt.command import command
from conveyor_server.adopt.triton import TritonModel, read_triton
from conveyor_server.runner.description import Constant, Description, Start, State, parse_description
from conveyor_server.runner.foreign import inputs_of
from conveyor_server.runner.step_file import read_graph
from foreign import Graph, lstm

CONFIG = """
# Paired in the order of their names, these states would be crossed.
name: "tagger"
backend: "onnxruntime"
max_batch_size: 64
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1, 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1, 8 ] } ]
instance_group [ { kind: KIND_CPU count: 2 } ]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  oldest { max_candidate_sequences: 64 }
  state [
    { input_name: "late" output_name: "LATE" data_type: TYPE_FP32 dims: [ 8 ]
      initial_state: { data_type: TYPE_FP32 dims: [ 8 ] zero_data: true name: "zeros" } },
    { input_name: "early" output_name: "EARLY" data_type: TYPE_FP32 dims: [ 8 ]
      initial_state: { data_type: TYPE_FP32 dims: [ 8 ] INITIAL name: "early" } }
  ]
}
"""
PLAIN = 'platform: "onnxruntime_onnx"\nmax_batch_size: 4\n'


def tagger() -> Graph:
    """Rows are the first axis of everything, as Triton has it."""
    graph = lstm(names={"h": "h1", "c": "c1", "hn": "h2", "cn": "c2"}, time=1)
    inner = {"late": "h1", "early": "c1"}
    graph.inputs = graph.inputs[:1]
    graph.outputs = graph.outputs[:1]
    axis, before = graph.weight(np.array([0])), []
    for name, inside in inner.items():
        graph.input(name, np.float32, ["N", 8])
        graph.node("Unsqueeze", [name, axis], inside)
        before.append(graph.nodes.pop())
    graph.nodes[:0] = before
    for name, inside in {"a_out": "h2", "b_out": "c2"}.items():
        graph.node("Squeeze", [inside, axis], name)
        graph.output(name, np.float32, ["N", 8])
    return graph


def controlled(*names: str) -> Graph:
    """A sum that knows of control inputs: `y` is all of them beside the sum."""
    graph = Graph()
    x, total = graph.input("x", np.float32, ["N", 1]), graph.input("total", np.float32, ["N", 1])
    graph.output(graph.node("Add", [x, total], "total_out"), np.float32, ["N", 1])
    parts = ["total_out", *(graph.input(name, np.float32, ["N", 1]) for name in names)]
    graph.output(graph.node("Concat", parts, "y", axis=1), np.float32, ["N", len(parts)])
    return graph


def config(late: str, early: str, initial: str) -> str:
    """The configuration with the outputs of both states."""
    return CONFIG.replace("LATE", late).replace("EARLY", early).replace("INITIAL", initial)


def stored(folder: Path, graph: Graph, config: str) -> Path:
    graph.save(folder / "m" / "1" / "model.onnx")
    (folder / "m" / "config.pbtxt").write_text(config)
    return folder / "m"


def read(folder: Path) -> TritonModel:
    return read_triton(folder, lambda path: list(inputs_of(read_graph(path)[0])))


def test_states_are_paired_as_they_are_named(tmp_path: Path, capsys) -> None:
    """Read by position, `early` would get `a_out`, which is of the same shape."""
    said, early = config("a_out", "b_out", 'data_file: "early"'), np.linspace(-1, 1, 8, dtype=np.float32)
    folder = stored(tmp_path, tagger(), said)
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "early").write_bytes(early.tobytes())
    assert command(["--triton", str(folder), "--models", str(tmp_path / "models")]) == 0, capsys.readouterr().err
    text = (tmp_path / "models" / "tagger" / "model.yaml").read_text()
    assert "# States, shapes and controls are those of Triton's config.pbtxt." in text
    described = parse_description(text.encode())
    assert described.states == (
        State("late", "late", "a_out", 0, (8,), 0),
        State("early", "early", "b_out", 0, (8,), early.tolist()),
    )
    assert described.batch == "dynamic"
    assert [item.name for item in described.outputs] == ["y"]


def test_a_configuration_that_crosses_them_is_refused(tmp_path: Path, capsys) -> None:
    folder = stored(tmp_path, tagger(), config("b_out", "a_out", "zero_data: true"))
    assert command(["--triton", str(folder), "--models", str(tmp_path / "models")]) == 2
    assert "is not paired as the graph uses it: input 'late' is the hidden state of" in capsys.readouterr().err


def controls(*kinds: str, values: str = "fp32_false_true: [ 0, 1 ]") -> str:
    inputs = ", ".join(
        f'{{ name: "{kind}" control [ {{ kind: CONTROL_SEQUENCE_{kind} {values} }} ] }}' for kind in kinds
    )
    state = 'state [ { input_name: "total" output_name: "total_out" data_type: TYPE_FP32 dims: [ 1 ] } ]'
    return PLAIN + f"sequence_batching {{ control_input [ {inputs} ] {state} }}"


def test_controls_that_the_graph_takes_are_fed(tmp_path: Path, capsys) -> None:
    folder = stored(tmp_path, controlled("START", "READY", "END"), controls("START", "READY", "END"))
    flags = ["--input", "x", "--models", str(tmp_path / "models")]
    assert command(["--triton", str(folder), *flags]) == 0, capsys.readouterr().err
    text = (tmp_path / "models" / "m" / "model.yaml").read_text()
    described = parse_description(text.encode())
    assert described.starts == (Start("START", 1.0, 0.0, 0),)
    assert described.constants == (Constant("READY", 1.0, 0), Constant("END", 0.0, 0))
    assert "# control START 'START' is fed: a session's first time step is told from its later ones" in text
    assert "# control END 'END' is never true" in text


def test_controls_that_the_graph_does_not_take_are_dropped(tmp_path: Path) -> None:
    model = read(stored(tmp_path, controlled(), controls("START", "CORRID", values="int32_false_true: [ 0, 1 ]")))
    assert (model.answers.starts, model.answers.constants) == ({}, {})
    assert model.notes == (
        "control START 'START' is dropped: the graph does not take it",
        "control CORRID 'CORRID' is dropped: the graph does not take it",
    )


def test_the_id_of_a_sequence_cannot_be_fed(tmp_path: Path) -> None:
    folder = stored(tmp_path, controlled("CORRID"), controls("CORRID", values="data_type: TYPE_UINT64"))
    with pytest.raises(Refused, match=r"takes the sequence's id as 'CORRID' \(CORRID\), which no answer may depend on"):
        read(folder)


def test_no_batch_there_is_one_row_here(tmp_path: Path) -> None:
    said = controls().replace("max_batch_size: 4", "max_batch_size: 0").replace("dims: [ 1 ]", "dims: [ 1, 1 ]")
    answers = read(stored(tmp_path, controlled(), said)).answers
    assert (answers.batch, answers.batch_axes, answers.shapes) == ("one", {}, {"total": (1, 1)})


def test_a_model_without_sequences_has_no_state(tmp_path: Path) -> None:
    said = PLAIN + 'input [ { name: "x" dims: [ -1 ] } ]\ndynamic_batching { }'
    model = read(stored(tmp_path, controlled(), said))
    assert model.answers.stateless
    assert (model.answers.states, model.answers.shapes, model.answers.batch_axes) == ({}, {}, {"x": 0})
    assert (model.name, model.version, model.file.name) == ("m", "1", "model.onnx")


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    said = PLAIN + 'input [ { name: "x" dims: [ -1 ] } ]\ndynamic_batching { }'
    folder = stored(tmp_path, controlled(), said)
    flags = ["--state", "total=total_out", "--shape", "x=1", "--name", "other", "--models", str(tmp_path / "models")]
    assert command(["--triton", str(folder), *flags]) == 0
    described: Description = parse_description((tmp_path / "models" / "other" / "model.yaml").read_bytes())
    assert [(state.input, state.output) for state in described.states] == [("total", "total_out")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: 'm' {", "is not a model configuration"),
        ('backend: "onnxruntime" no_such_field: 1', "is not a model configuration: .*no_such_field"),
        ('platform: "tensorrt_plan"', "its platform is tensorrt_plan, and only ONNX models can be adopted"),
        ("", "its platform is nothing"),
        (PLAIN + 'ensemble_scheduling { step [ { model_name: "a" } ] }', "asks for an ensemble"),
        (PLAIN + "model_transaction_policy { decoupled: true }", "asks for decoupled answers"),
        (PLAIN + "sequence_batching { iterative_sequence: true }", "go on by themselves"),
        (PLAIN + 'input [ { name: "x" allow_ragged_batch: true } ]', "asks for ragged batches"),
        (PLAIN + 'batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: "n" } ]', "makes of a batch"),
        (
            PLAIN + 'sequence_batching { state [ { input_name: "a" output_name: "b" use_growable_memory: true } ] }',
            "state that grows",
        ),
        (
            PLAIN + 'sequence_batching { state [ { input_name: "a" output_name: "b" initial_state: '
            '{ data_type: TYPE_FP32 dims: [2] data_file: "none" } } ] }',
            "none cannot be read: No such file",
        ),
        (
            PLAIN + 'sequence_batching { state [ { input_name: "a" output_name: "b" initial_state: '
            '{ data_type: TYPE_FP32 dims: [2] data_file: "../../../../etc/hostname" } } ] }',
            "of a kind or in a place that cannot be read",
        ),
        (
            PLAIN + 'sequence_batching { state [ { input_name: "a" output_name: "b" initial_state: '
            '{ data_type: TYPE_FP32 dims: [2] data_file: "short" } } ] }',
            r"is not of the shape \[2\]",
        ),
    ],
)
def test_what_conveyor_does_not_do_is_refused(text: str, told: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, controlled(), text)
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "short").write_bytes(b"\0\0\0\0")
    with pytest.raises(Refused, match=told):
        read(folder)


def test_a_folder_without_configuration_or_version(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"config\.pbtxt cannot be read"):
        read(tmp_path)
    (tmp_path / "config.pbtxt").write_text(PLAIN)
    with pytest.raises(Refused, match="has no version folder such as"):
        read(tmp_path)
