"""The graph inside a model file: what is stripped from it, its digest, and its weights beside it.

Invariant: the digest is of the function alone, so it is the same with weights inline or beside, and whatever the
metadata and names of files say.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

# A protobuf message ends at 2 GB; the rest is room for the graph itself and its description.
MAX_INLINE_BYTES = 2_000_000_000 - 64_000_000

# Smaller weights stay inline: they are not worth a mapped page.
_MIN_EXTERNAL_BYTES = 1024
# Offsets that can be mapped into memory, whatever the platform's page size is (up to 64 KiB would be allowed).
_ALIGNMENT = 4096


def strip(proto: onnx.ModelProto) -> None:
    """Removes, in place, what a file should not tell: metadata, doc strings, and with them stack traces and paths."""
    for message in _messages(proto):
        names = message.DESCRIPTOR.fields_by_name
        for field in ("doc_string", "metadata_props"):
            if field in names:
                message.ClearField(field)


def digest(proto: onnx.ModelProto, folder: Path | None = None) -> str:
    """Lower-case hex SHA-256 over the graph, its functions, weights and opset imports.

    Args:
        proto: left as it is.
        folder: where the weights lie that are not inline.

    Raises:
        OSError: weights beside the file are missing.
    """
    skeleton = onnx.ModelProto()
    skeleton.graph.CopyFrom(proto.graph)
    skeleton.functions.extend(proto.functions)
    skeleton.opset_import.extend(sorted(proto.opset_import, key=lambda item: item.domain))
    strip(skeleton)
    hasher = hashlib.sha256()
    for message in _messages(skeleton):
        if isinstance(message, onnx.TensorProto) and message.data_type != onnx.TensorProto.STRING:
            content = numpy_helper.to_array(message, str(folder or ""))
            hasher.update(np.ascontiguousarray(content).view(np.uint8).data if content.size else b"")
            _empty(message)
    hasher.update(skeleton.SerializeToString(deterministic=True))
    return hasher.hexdigest()


def weights_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of all inline tensors, subgraphs and functions included."""
    # len(raw_data), not ByteSize(): the latter fails just where the answer matters, over 2 GB.
    return sum(len(message.raw_data) for message in _messages(proto) if isinstance(message, onnx.TensorProto))


def externalize(proto: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """Writes the graph's weights to `file` and returns a copy of the graph that names it, as a neighbour.

    Raises:
        OSError: the file cannot be written.
    """
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    with file.open("xb") as stream:
        for message in _messages(moved):
            if not isinstance(message, onnx.TensorProto) or len(message.raw_data) < _MIN_EXTERNAL_BYTES:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            external_data_helper.set_external_data(message, file.name, stream.tell(), len(message.raw_data))
            stream.write(message.raw_data)
            message.ClearField("raw_data")
    return moved


def _empty(tensor: onnx.TensorProto) -> None:
    """Leaves name, type and dimensions."""
    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    tensor.CopyFrom(kept)


def _messages(message: Any) -> Iterator[Any]:
    """The message and all messages in it, depth first, in field order; a copy of the list is taken at each level."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in list(value) if field.is_repeated else [value]:
            yield from _messages(inner)
