"""What a model file says about itself, as text that a person reads.

Invariant: needs onnx and no torch, and reads nothing but the file and the weights that it names.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx
from conveyor_proto import vectors
from conveyor_proto.codec import describe_shape, to_numpy_dtype
from conveyor_proto.spec import initial_row, state_row_bytes
from conveyor_proto.v1 import spec_pb2

from conveyor_export.package_graph import digest
from conveyor_export.verify_table import align, format_verification

_LAYER_KINDS = {
    spec_pb2.LAYER_KIND_RNN_TANH: "RNN (tanh)",
    spec_pb2.LAYER_KIND_RNN_RELU: "RNN (relu)",
    spec_pb2.LAYER_KIND_LSTM: "LSTM",
    spec_pb2.LAYER_KIND_GRU: "GRU",
}


def describe(spec: spec_pb2.ModelSpec, proto: onnx.ModelProto, file: Path) -> str:
    """Everything that a ModelSpec says, in sections; the digest is compared with the file's content.

    Args:
        spec: what the file says of itself.
        proto: the file's graph.
        file: where it lies, for its sizes and its weights.
    """
    sections = [
        ("inputs", _tensors(spec.inputs)),
        ("outputs", _tensors(spec.outputs)),
        (f"states, {human_bytes(spec.state_bytes)} per session", _states(spec)),
        ("layers", _layers(spec)),
        ("operations", _operations(spec)),
        ("provenance", _provenance(spec)),
        ("file", _file(spec, proto, file)),
    ]
    blocks = ["\n".join([title, *align(rows, left=len(rows[0]))]) for title, rows in sections if rows]
    return "\n\n".join([f"{spec.name or file.stem}  {file}", *blocks, f"verified\n  {_verification(spec)}"])


def human_bytes(size: int) -> str:
    """A size in bytes, with its binary unit above 1 KiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{size} B ({value:.1f} {unit})"


def _tensors(items: Iterable[spec_pb2.TensorSpec]) -> list[list[str]]:
    return [
        [item.name, str(to_numpy_dtype(item.dtype)), describe_shape(item), "" if item.has_time else "one per step"]
        for item in items
    ]


def _states(spec: spec_pb2.ModelSpec) -> list[list[str]]:
    return [
        [
            state.name,
            str(to_numpy_dtype(state.dtype)),
            str(list(state.shape)),
            f"{state_row_bytes(state)} B",
            spec_pb2.StateRole.Name(state.role).removeprefix("STATE_ROLE_").lower(),
            "learned" if initial_row(state).any() else "zeros",
        ]
        for state in spec.states
    ]


def _layers(spec: spec_pb2.ModelSpec) -> list[list[str]]:
    return [
        [
            layer.path or "(the module itself)",
            _LAYER_KINDS.get(layer.kind, "unknown"),
            f"{layer.input_size} -> {layer.hidden_size}",
            f"projected to {layer.proj_size}" if layer.proj_size else "",
        ]
        for layer in spec.layers
    ]


def _operations(spec: spec_pb2.ModelSpec) -> list[list[str]]:
    counts = sorted(spec.operations.items(), key=lambda item: (-item[1], item[0]))
    return [[", ".join(f"{name} x {count}" if count > 1 else name for name, count in counts)]] if counts else []


def _provenance(spec: spec_pb2.ModelSpec) -> list[list[str]]:
    origin = spec.provenance
    lines = [
        ["module", origin.module],
        ["parameters", f"{origin.parameters:,}"],
        ["exported", origin.exported_at],
        ["by", f"conveyor {origin.conveyor_version}, torch {origin.torch_version}, onnx {origin.onnx_version}"],
        ["graph", f"opset {origin.opset}, IR {origin.ir_version}, time as {origin.form}"],
    ]
    return [line for line in lines if line[1]]


def _file(spec: spec_pb2.ModelSpec, proto: onnx.ModelProto, file: Path) -> list[list[str]]:
    size = file.stat().st_size
    lines = [["model", human_bytes(size)]]
    if spec.external_data:
        weights = file.with_name(spec.external_data)
        lines.append(
            [
                "weights",
                f"{weights.name}, {human_bytes(weights.stat().st_size)}"
                if weights.exists()
                else f"{weights.name} is MISSING",
            ]
        )
    lines += [
        [
            "lengths",
            f"{spec.lengths_input!r}, rows of different lengths in one call"
            if spec.lengths_input
            else "none: rows of one call have one length",
        ],
        ["inputs", "NaN and infinities accepted" if spec.allow_non_finite_inputs else "NaN and infinities refused"],
        ["vectors", _vectors(spec, proto)],
        ["digest", f"{spec.digest} ({_digest_check(spec, proto, file)})"],
    ]
    return lines


def _digest_check(spec: spec_pb2.ModelSpec, proto: onnx.ModelProto, file: Path) -> str:
    try:
        found = digest(proto, file.parent)
    except Exception as error:  # weights beside the file are missing, cut or elsewhere: each has an error of its own
        return f"cannot be checked: {error}"
    return "the file matches" if found == spec.digest else f"DOES NOT MATCH the file: {found}"


def _vectors(spec: spec_pb2.ModelSpec, proto: onnx.ModelProto) -> str:
    """How much a server can check the file by; it checks the vectors themselves when it loads them."""
    text = next((item.value for item in proto.metadata_props if item.key == vectors.METADATA_KEY), None)
    if text is None:
        return "none: a server that loads this file cannot check what it computes"
    try:
        found = vectors.parse_vectors(text, spec)
    except vectors.VectorsError as error:
        return f"a server refuses this file: {error}"
    steps = [str(vector.time_steps) for vector in found.vectors]
    size = human_bytes(vectors.vectors_bytes(found))
    return f"{size}, of {', '.join(steps)} time steps, which a server runs before it serves"


def _verification(spec: spec_pb2.ModelSpec) -> str:
    if not spec.HasField("verification"):
        return "no: this file carries no figures"
    return format_verification(spec.verification).replace("\n", "\n  ")
