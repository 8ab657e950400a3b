"""What a Triton configuration says of a model: its states by name, its control inputs, its shapes.

Invariant: states are paired as `sequence_batching.state` names them. What Triton would do and Conveyor cannot is
refused; what has no part in the answers (instances, queues, policies) is passed over.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conveyor_proto.inference import model_config_pb2 as pb
from google.protobuf import text_format

from conveyor_server.adopt.answers import Answers, Refused
from conveyor_server.runner.description import Constant, Start, Value

CONFIG = "config.pbtxt"
_DTYPES: Mapping[int, type[np.generic]] = {
    pb.TYPE_BOOL: np.bool_,
    pb.TYPE_UINT8: np.uint8,
    pb.TYPE_UINT16: np.uint16,
    pb.TYPE_UINT32: np.uint32,
    pb.TYPE_UINT64: np.uint64,
    pb.TYPE_INT8: np.int8,
    pb.TYPE_INT16: np.int16,
    pb.TYPE_INT32: np.int32,
    pb.TYPE_INT64: np.int64,
    pb.TYPE_FP16: np.float16,
    pb.TYPE_FP32: np.float32,
    pb.TYPE_FP64: np.float64,
}
_Control = pb.ModelSequenceBatching.Control
_KINDS = {
    _Control.CONTROL_SEQUENCE_START: "START",
    _Control.CONTROL_SEQUENCE_READY: "READY",
    _Control.CONTROL_SEQUENCE_END: "END",
    _Control.CONTROL_SEQUENCE_CORRID: "CORRID",
}
# A longer initial row belongs into the graph.
_MAX_INITIAL = 65536


@dataclass(frozen=True, slots=True)
class TritonModel:
    """A model of a Triton repository.

    Attributes:
        name: its folder's.
        version: the highest there is.
        file: its file.
        answers: what its configuration says.
        notes: what was done with its control inputs, a line each.
    """

    name: str
    version: str
    file: Path
    answers: Answers
    notes: tuple[str, ...]


def read_triton(folder: Path, graph_inputs: Callable[[Path], list[str]]) -> TritonModel:
    """Reads a model of a Triton repository.

    Args:
        folder: NAME, with config.pbtxt and NAME/VERSION/model.onnx.
        graph_inputs: names the inputs of an ONNX file.

    Raises:
        Refused: it cannot be read, is no ONNX model, or does what Conveyor cannot.
    """
    config = _config(folder)
    _check(config)
    versions = sorted((item.name for item in folder.iterdir() if item.name.isdecimal()), key=int)
    if not versions:
        raise Refused(f"{folder} has no version folder such as {folder / '1'}")
    file = folder / versions[-1] / (config.default_model_filename or "model.onnx")
    notes: list[str] = []
    answers = _answers(config, folder, graph_inputs(file), notes)
    return TritonModel(config.name or folder.name, versions[-1], file, answers, tuple(notes))


def _config(folder: Path) -> pb.ModelConfig:
    path = folder / CONFIG
    try:
        return text_format.Parse(path.read_text(), pb.ModelConfig())
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    except text_format.ParseError as error:
        raise Refused(f"{path} is not a model configuration: {error}") from error


def _check(config: pb.ModelConfig) -> None:
    if config.platform != "onnxruntime_onnx" and config.backend != "onnxruntime":
        kind = config.platform or config.backend or "nothing"
        raise Refused(f"its platform is {kind}, and only ONNX models can be adopted (onnxruntime_onnx)")
    refused = {
        "an ensemble": config.HasField("ensemble_scheduling"),
        "decoupled answers": config.model_transaction_policy.decoupled,
        "inputs that Triton makes of a batch (batch_input)": bool(config.batch_input or config.batch_output),
        "sequences that go on by themselves (iterative_sequence)": config.sequence_batching.iterative_sequence,
        "ragged batches": any(item.allow_ragged_batch for item in config.input),
        "state that grows (use_growable_memory)": any(s.use_growable_memory for s in config.sequence_batching.state),
    }
    for what, is_there in refused.items():
        if is_there:
            raise Refused(
                f"its {CONFIG} asks for {what}, which Conveyor does not do: adopt the file itself if it needs not"
            )


def _answers(config: pb.ModelConfig, folder: Path, graph_inputs: list[str], notes: list[str]) -> Answers:
    batched = config.max_batch_size > 0
    sequence = config.sequence_batching
    states = {item.input_name: item.output_name for item in sequence.state}
    constants, starts = _controls(sequence, graph_inputs, 0 if batched else None, notes)
    named = [*(item.name for item in config.input), *states]
    shapes = {item.name: tuple(item.reshape.shape if item.HasField("reshape") else item.dims) for item in config.input}
    shapes |= {item.input_name: tuple(item.dims) for item in sequence.state}
    return Answers(
        states=states,
        inputs=frozenset(item.name for item in config.input),
        outputs=tuple(item.name for item in config.output),
        stateless=not states,
        batch=None if batched else "one",
        batch_axes=dict.fromkeys(named, 0) if batched else {},
        # What is variable there has to be said here: a state's row, and a time step's, are of one size.
        shapes={name: shape for name, shape in shapes.items() if all(size > 0 for size in shape)},
        constants=constants,
        starts=starts,
        initial={item.input_name: _initial(item, folder) for item in sequence.state},
    )


def _controls(
    sequence: pb.ModelSequenceBatching, graph_inputs: list[str], batch_axis: int | None, notes: list[str]
) -> tuple[dict[str, Constant], dict[str, Start]]:
    constants: dict[str, Constant] = {}
    starts: dict[str, Start] = {}
    for name, control in _each_control(sequence):
        kind = _KINDS[control.kind]
        if name not in graph_inputs:
            notes.append(f"control {kind} {name!r} is dropped: the graph does not take it")
        elif kind == "START":
            starts[name] = Start(name, _when(control, True), _when(control, False), batch_axis)
            notes.append(f"control START {name!r} is fed: a session's first time step is told from its later ones")
        elif kind == "READY":
            constants[name] = Constant(name, _when(control, True), batch_axis)
            notes.append(f"control READY {name!r} is always true: a run has no rows that are not ready")
        elif kind == "END":
            constants[name] = Constant(name, _when(control, False), batch_axis)
            notes.append(f"control END {name!r} is never true: a session's last time step is known only after it")
        else:
            raise Refused(
                f"the graph takes the sequence's id as {name!r} (CORRID), which no answer may depend on here: make the "
                "file anew without it"
            )
    return constants, starts


def _each_control(
    sequence: pb.ModelSequenceBatching,
) -> Iterator[tuple[str, pb.ModelSequenceBatching.Control]]:
    for item in sequence.control_input:
        for control in item.control:
            yield item.name, control


def _when(control: pb.ModelSequenceBatching.Control, truth: bool) -> Value:
    for values in (control.int32_false_true, control.fp32_false_true, control.bool_false_true):
        if len(values) == 2:
            return values[1 if truth else 0]
    return 1 if truth else 0


def _initial(state: pb.ModelSequenceBatching.State, folder: Path) -> Value:
    """The row that a sequence begins with; zeros where nothing is said, as in Triton."""
    if not state.initial_state or not state.initial_state[0].data_file:
        return 0
    said = state.initial_state[0]
    path = folder / "initial_state" / said.data_file
    if said.data_type not in _DTYPES or not path.resolve().is_relative_to(folder.resolve()):
        raise Refused(f"the initial state of {state.input_name!r} is of a kind or in a place that cannot be read")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"the initial state {path} cannot be read: {error.strerror}") from error
    try:
        row = np.frombuffer(content, _DTYPES[said.data_type]).reshape(tuple(said.dims))
    except ValueError:
        raise Refused(f"the initial state {path} is not of the shape {list(said.dims)} that {CONFIG} says") from None
    if row.size > _MAX_INITIAL:
        raise Refused(
            f"the initial state {path} has {row.size} values: put a row of more than {_MAX_INITIAL} into the graph"
        )
    value: Value = row.tolist()
    return value
