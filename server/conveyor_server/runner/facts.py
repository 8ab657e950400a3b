"""What can be known of a graph that Conveyor did not export: its operators, recurrent layers, size and digest.

Invariant: what is written here was read from the file. Whatever only its maker knows stays empty.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from conveyor_proto.v1 import spec_pb2
from onnx import TensorProto

from conveyor_server.runner.nodes import graphs, tensors

# Provenance.form of a file that Conveyor did not export.
ADOPTED = "adopted"
_LAYERS = {
    "LSTM": spec_pb2.LAYER_KIND_LSTM,
    "GRU": spec_pb2.LAYER_KIND_GRU,
    "RNN": spec_pb2.LAYER_KIND_RNN_TANH,
}
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_CHUNK_BYTES = 1 << 20


def add_facts(spec: spec_pb2.ModelSpec, proto: onnx.ModelProto) -> None:
    """Writes operations, layers and provenance of a file's own graph into a spec.

    Args:
        spec: of the step model.
        proto: the file's own graph.
    """
    counts = Counter(node.op_type for graph in graphs(proto.graph) for node in graph.node)
    for name, count in counts.items():
        spec.operations[name] = count
    spec.layers.extend(_layer(node, sizes) for node, sizes in _recurrent(proto.graph))
    opsets = [item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")]
    spec.provenance.opset = max(opsets)
    spec.provenance.ir_version = proto.ir_version
    spec.provenance.form = ADOPTED
    spec.provenance.parameters = sum(math.prod(item.dims) for item in tensors(proto) if item.data_type in _FLOATS)


def digest(proto: onnx.ModelProto, folder: Path, spec: spec_pb2.ModelSpec) -> str:
    """Lower-case hex SHA-256 over a step model: graph, functions, opset imports, weights, and how states go on.

    Args:
        proto: the step model; it stays as it is.
        folder: where weights lie that are not inline, checked to be the model's own.
        spec: its description; pairs and initial rows are in no graph.

    Raises:
        OSError: weights beside the file cannot be read.
    """
    skeleton = onnx.ModelProto()
    skeleton.graph.CopyFrom(proto.graph)
    skeleton.functions.extend(proto.functions)
    skeleton.opset_import.extend(sorted(proto.opset_import, key=lambda item: item.domain))
    hasher = hashlib.sha256()
    for message in _messages(skeleton):
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
        if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
            _add_external(hasher, message, folder)
    of_states = spec_pb2.ModelSpec(states=spec.states, inputs=spec.inputs, outputs=spec.outputs)
    for part in (skeleton, of_states):
        hasher.update(part.SerializeToString(deterministic=True))
    return hasher.hexdigest()


def _add_external(hasher: Any, tensor: TensorProto, folder: Path) -> None:
    """Hashes a tensor's bytes, and forgets where they lie."""
    said = {item.key: item.value for item in tensor.external_data}
    del tensor.external_data[:]
    with (folder / said["location"]).open("rb") as stream:
        stream.seek(int(said.get("offset") or 0))
        left = int(said["length"]) if said.get("length") else None
        while left != 0 and (chunk := stream.read(_CHUNK_BYTES if left is None else min(left, _CHUNK_BYTES))):
            hasher.update(chunk)
            left = None if left is None else left - len(chunk)


def _recurrent(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, dict[str, list[int]]]]:
    """Recurrent nodes, each with the sizes of the weights that it can see."""
    sizes: dict[str, list[int]] = {}
    for inner in graphs(graph):
        sizes |= {item.name: list(item.dims) for item in inner.initializer}
        for node in inner.node:
            if node.op_type == "Constant" and node.attribute:
                sizes[node.output[0]] = list(node.attribute[0].t.dims)
            if node.op_type in _LAYERS and node.domain in ("", "ai.onnx"):
                yield node, sizes


def _layer(node: onnx.NodeProto, sizes: dict[str, list[int]]) -> spec_pb2.LayerSpec:
    attributes = {item.name: item for item in node.attribute}
    kind = _LAYERS[node.op_type]
    if node.op_type == "RNN" and b"Relu" in getattr(attributes.get("activations"), "strings", ()):
        kind = spec_pb2.LAYER_KIND_RNN_RELU
    hidden = attributes["hidden_size"].i if "hidden_size" in attributes else 0
    weights = sizes.get(node.input[1], [0, 0, 0])
    return spec_pb2.LayerSpec(
        path=node.name or next(name for name in node.output if name),
        kind=kind,
        input_size=weights[2] if len(weights) == 3 else 0,
        hidden_size=hidden,
        node=node.name,
    )


def _messages(message: Any) -> Iterator[Any]:
    """The message and all messages in it, depth first, in field order."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in list(value) if field.is_repeated else [value]:
                yield from _messages(inner)
