"""A step model's file, read and checked without running it.

Invariant: a StepFile's graph has exactly the inputs and outputs that its ModelSpec describes, with a dynamic batch
and time axis, and refers to no file outside its own folder. A file that says nothing of itself is described by the
model.yaml of its model, and made a step model as that says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from conveyor_proto import codec
from conveyor_proto import spec as specs
from conveyor_proto import vectors as verifier_vectors
from conveyor_proto.v1 import spec_pb2, tensor_pb2, vectors_pb2
from google.protobuf.message import DecodeError

from conveyor_server.runner.adopting import adopt
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.nodes import inferred_outputs, kind_name, tensors

# Below it ScatterND, Where and the recurrent operators lack forms that the wrapping relies on.
MIN_OPSET = 13


@dataclass(frozen=True, slots=True)
class StepFile:
    """A step model as its file holds it; external weights are not loaded.

    Attributes:
        path: the file `model.onnx`.
        proto: the graph. Whoever changes it copies it first.
        spec: its description.
        opset: version of the standard operator set.
        vectors: what it is to be checked by; None: it says nothing, or was adopted.
    """

    path: Path
    proto: onnx.ModelProto
    spec: spec_pb2.ModelSpec
    opset: int
    vectors: vectors_pb2.VerifierVectors | None = None


def read_step_file(path: Path) -> StepFile:
    """Reads and checks a step model's file. Any thread; blocks on the disk.

    Raises:
        RunnerUnavailable: the file cannot be read, points outside its folder, disagrees with its ModelSpec or its
            model.yaml, or has neither and may have state.
    """
    proto, opset = read_graph(path)
    texts = [item.value for item in proto.metadata_props if item.key == specs.METADATA_KEY]
    if texts:
        spec = _spec(texts[0], path)
    else:
        proto, spec = adopt(proto, path)
    differences = _differences(proto, spec)
    if differences:
        told = "; ".join(differences)
        raise RunnerUnavailable(f"{path.name} is not what its ModelSpec says: {told}. Export the model again")
    return StepFile(path, proto, spec, opset, _vectors(proto, spec, path) if texts else None)


def read_graph(path: Path) -> tuple[onnx.ModelProto, int]:
    """The graph of any ONNX file, without weights that are not inline, and its opset. Any thread; blocks on the disk.

    Raises:
        RunnerUnavailable: the file cannot be read, is of too old an opset, or points outside its folder.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise RunnerUnavailable(f"{path.name} is not there: export the model into this folder") from None
    except OSError as error:
        raise RunnerUnavailable(f"{path.name} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise RunnerUnavailable(f"{path.name} is not an ONNX file, or is cut short: export the model again") from error
    opset = _opset(proto, path)
    _check_external_data(proto, path.parent)
    return proto, opset


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    versions = [item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")]
    if not versions or max(versions) < MIN_OPSET:
        found = f"opset {max(versions)}" if versions else "no standard opset"
        raise RunnerUnavailable(
            f"{path.name} has {found}; {MIN_OPSET} or newer is needed: export the model again, or convert "
            "it with onnx.version_converter"
        )
    return max(versions)


def _spec(text: str, path: Path) -> spec_pb2.ModelSpec:
    try:
        spec = specs.parse_spec(text)
    except (specs.SpecError, codec.WireError) as error:
        raise RunnerUnavailable(f"{path.name}: {error}") from error
    if spec.states and not spec.lengths_input and spec.max_time_steps_per_run != 1:
        raise RunnerUnavailable(f"{path.name} has state but no lengths input: rows of a batch could not differ in time")
    return spec


def _vectors(proto: onnx.ModelProto, spec: spec_pb2.ModelSpec, path: Path) -> vectors_pb2.VerifierVectors | None:
    texts = [item.value for item in proto.metadata_props if item.key == verifier_vectors.METADATA_KEY]
    if not texts:
        return None
    try:
        return verifier_vectors.parse_vectors(texts[0], spec)
    except verifier_vectors.VectorsError as error:
        raise RunnerUnavailable(f"{path.name}: {error}") from error


def _check_external_data(proto: onnx.ModelProto, folder: Path) -> None:
    for tensor in tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location: str | bytes = next((item.value for item in tensor.external_data if item.key == "location"), "")
        if isinstance(location, bytes):
            # protobuf's word for text that is not UTF-8.
            raise RunnerUnavailable(f"weights {tensor.name!r} lie at {location!r}, which is no file's name")
        relative = PurePosixPath(location)
        if not location or relative.is_absolute() or ".." in relative.parts or "\\" in location:
            raise RunnerUnavailable(
                f"weights {tensor.name!r} lie at {location!r}: only files of the model's own folder"
            )
        target = folder / relative
        if not target.resolve().is_relative_to(folder.resolve()):
            raise RunnerUnavailable(f"weights {tensor.name!r} lie at {location!r}, a link out of the model's folder")
        if not target.is_file():
            raise RunnerUnavailable(f"weights file {location!r} is missing: copy it beside the model")


@dataclass(frozen=True, slots=True)
class _Expected:
    """A graph input or output as the ModelSpec has it; None in shape: any size."""

    name: str
    dtype: tensor_pb2.DataType.ValueType
    shape: tuple[int | None, ...]


def _differences(proto: onnx.ModelProto, spec: spec_pb2.ModelSpec) -> list[str]:
    """What a person must know about a graph that is not what its ModelSpec says; empty where it is."""
    inputs, outputs = _expected(spec)
    weights = {item.name for item in proto.graph.initializer}
    graph_inputs = [item for item in proto.graph.input if item.name not in weights]
    graph_outputs = list(proto.graph.output)
    if any(not item.type.tensor_type.HasField("shape") for item in graph_outputs):
        graph_outputs = inferred_outputs(proto)
    return [
        *_compare("input", inputs, graph_inputs),
        *_compare("output", outputs, graph_outputs),
    ]


def _expected(spec: spec_pb2.ModelSpec) -> tuple[list[_Expected], list[_Expected]]:
    def user(item: spec_pb2.TensorSpec) -> _Expected:
        return _Expected(item.name, item.dtype, (None, None, *item.shape) if item.has_time else (None, *item.shape))

    inputs = [user(item) for item in spec.inputs]
    outputs = [user(item) for item in spec.outputs]
    for state in spec.states:
        inputs.append(_Expected(state.input_name, state.dtype, (None, *state.shape)))
        outputs.append(_Expected(state.output_name, state.dtype, (None, *state.shape)))
    if spec.lengths_input:
        inputs.append(_Expected(spec.lengths_input, tensor_pb2.DATA_TYPE_INT32, (None,)))
    return inputs, outputs


def _compare(what: str, expected: Sequence[_Expected], found: Sequence[onnx.ValueInfoProto]) -> Iterator[str]:
    by_name = {item.name: item for item in found}
    names = [item.name for item in expected]
    yield from (f"{what} {name!r} is not in the graph" for name in names if name not in by_name)
    yield from (f"the graph has {what} {name!r}, which the spec does not" for name in by_name if name not in names)
    for item in expected:
        if item.name in by_name:
            yield from _compare_tensor(what, item, by_name[item.name].type)


def _compare_tensor(what: str, expected: _Expected, found: onnx.TypeProto) -> Iterator[str]:
    if not found.HasField("tensor_type"):
        yield f"{what} {expected.name!r} is not a tensor"
        return
    dtype = codec.to_numpy_dtype(expected.dtype)
    element = found.tensor_type.elem_type
    if element != onnx.helper.np_dtype_to_tensor_dtype(dtype):
        got = kind_name(element)
        yield f"{what} {expected.name!r} is {dtype} in the spec and {got} in the graph"
    if not found.tensor_type.HasField("shape"):
        return  # not even shape inference knows; the first run will
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in found.tensor_type.shape.dim]
    wrong = [
        got is not None if wanted is None else got not in (None, wanted)
        for wanted, got in zip(expected.shape, dims, strict=False)
    ]
    if len(dims) != len(expected.shape) or any(wrong):
        yield f"{what} {expected.name!r} is {_show(expected.shape)} in the spec and {_show(dims)} in the graph"


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
