"""From a file that says nothing of itself to a step model: by its model.yaml, or because it plainly has no state.

Invariant: state is never guessed. A file without model.yaml is served only where no output could be the new value of
an input, and every size but the number of rows is in the file.
"""

import logging
from pathlib import Path

import onnx
from conveyor_proto import spec as specs
from conveyor_proto.v1 import spec_pb2

from conveyor_server.runner.adopted import rewrite
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import FILE_NAME, Description, Input, Output, read_description
from conveyor_server.runner.facts import add_facts, digest
from conveyor_server.runner.fitting import fit
from conveyor_server.runner.foreign import Tensor, agree, inputs_of, outputs_of
from conveyor_server.runner.nodes import graphs

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_log = logging.getLogger(__name__)


def adopt(proto: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, spec_pb2.ModelSpec]:
    """The step model of a file NAME/VERSION/model.onnx that has no ModelSpec, and its description.

    Args:
        proto: the file's own graph; it stays as it is.
        path: the file. NAME/model.yaml describes it.

    Raises:
        RunnerUnavailable: model.yaml is wrong or does not fit; or there is none and the file may have state. The
            message says what to write.
    """
    folder = path.parent.parent
    beside = folder / FILE_NAME
    if beside.is_file():
        description = read_description(beside)
        try:
            model, spec = described(proto, description, path.parent, folder.name)
        except RunnerUnavailable as error:
            raise RunnerUnavailable(f"{FILE_NAME} does not fit {path.name}: {error}") from error
        _log.info("%s: adopted as %s says: %s", folder.name, FILE_NAME, _told(spec))
        return model, spec
    description = _stateless(proto, path)
    model, spec = described(proto, description, path.parent, folder.name)
    _log.info(
        "%s: has no %s and no output that could be a state, so it is served without state", folder.name, FILE_NAME
    )
    return model, spec


def described(
    proto: onnx.ModelProto, description: Description, folder: Path, name: str
) -> tuple[onnx.ModelProto, spec_pb2.ModelSpec]:
    """The step model of a graph as it is described, and its ModelSpec.

    Args:
        proto: the file's own graph; it stays as it is.
        description: of it.
        folder: where its weights lie that are not inline, checked to be its own.
        name: of the model.

    Raises:
        RunnerUnavailable: the two do not fit.
    """
    model, spec = rewrite(proto, fit(proto, description), name)
    add_facts(spec, proto)
    try:
        spec.digest = digest(model, folder, spec)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not say where they are"
        raise RunnerUnavailable(f"weights beside the file cannot be read: {why}") from error
    try:
        specs.check_spec(spec)
    except specs.SpecError as error:
        raise RunnerUnavailable(str(error)) from error
    return model, spec


def may_be_state(source: Tensor, target: Tensor) -> bool:
    """True where an output could be the new value of an input, by dtype and shape."""
    if source.dtype != target.dtype:
        return False
    return source.dims is None or target.dims is None or agree(source.dims, target.dims)


def _stateless(proto: onnx.ModelProto, path: Path) -> Description:
    """The description of a file that plainly has no state, with a batch in axis 0 and every other size fixed."""
    try:
        inputs, outputs = inputs_of(proto), outputs_of(proto)
    except RunnerUnavailable as error:
        raise RunnerUnavailable(f"{path.name}: {error}") from error
    states = [
        f"{target} could be the new value of {source}"
        for source in inputs.values()
        for target in outputs.values()
        if may_be_state(source, target)
    ]
    if states:
        raise _undescribed(path, f"may have state ({'; '.join(states[:4])})")
    if any(node.op_type in _RECURRENT for graph in graphs(proto.graph) for node in graph.node):
        raise _undescribed(path, "has recurrent operators, and may forget what it should not")
    for tensor in (*inputs.values(), *outputs.values()):
        dims = tensor.dims
        if not dims or isinstance(dims[0], int) or not all(isinstance(dim, int) for dim in dims[1:]):
            raise _undescribed(path, f"does not say plainly which axis of {tensor} counts rows, and how large a row is")
    if not inputs or not outputs:
        raise RunnerUnavailable(f"{path.name} takes nothing or gives nothing: there is nothing to serve")
    return Description(
        tuple(Input(name, batch_axis=0) for name in inputs), tuple(Output(name, batch_axis=0) for name in outputs)
    )


def _undescribed(path: Path, why: str) -> RunnerUnavailable:
    return RunnerUnavailable(
        f"{path.name} has no {specs.METADATA_KEY}: make it with `conveyor export`. If it comes from elsewhere, it "
        f"{why}, and nothing is guessed: write its {FILE_NAME} with `conveyor adopt "
        f"{'/'.join(path.absolute().parts[-3:])}`, from the folder of the models"
    )


def _told(spec: spec_pb2.ModelSpec) -> str:
    """One clause, for the log."""
    states = ", ".join(f"{state.input_name} <- {state.output_name}" for state in spec.states) or "none"
    rows = "any number of rows a run"
    if spec.max_rows == 1:
        rows = "row by row, because it says `batch: one`"
    elif spec.min_rows > 1:
        rows += ", and never one alone, because it says `batch: company`"
    return f"states {states}; {rows}"
