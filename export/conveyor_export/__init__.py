"""From a trained torch.nn.Module to a step model in ONNX with explicit state.

Invariant: a file is written only after the verifier has passed the model. Importing this package imports neither torch
nor onnxruntime: `conveyor inspect` and the server's machine need neither.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conveyor_proto.v1 import spec_pb2

from conveyor_export.errors import CaptureError, ExportError, VerificationFailed, WriteRefused

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CaptureError",
    "ExportError",
    "ExportResult",
    "VerificationFailed",
    "WriteRefused",
    "export",
]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made.

    Attributes:
        spec: the model's description as it stands in the file, with digest and verification.
        path: the `.onnx` file.
        verification: the verifier's figures.
    """

    spec: spec_pb2.ModelSpec
    path: Path
    verification: spec_pb2.Verification


def export(
    module: "nn.Module",
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    tolerance: float = 1e-5,
    verify_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    allow_non_finite_inputs: bool = False,
    external_data: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExportResult:
    """Captures a trained module, verifies it against PyTorch and writes it as a step model.

    The module is left as it was: its parameters, buffers and training mode do not change. The hidden state may be
    made inside `forward` or passed through its signature; either way it becomes explicit state of the file.

    Args:
        module: an unmodified recurrent module. It is captured and verified in eval mode.
        example_inputs: one batch as forward takes it: a tensor `[batch, time, ...]`, a tuple of positional arguments or
            a dict of keyword arguments.
        path: a version folder such as `models/NAME/1`, made when missing, or a `.onnx` file.
        name: the model's name; by default the folder that holds the version, or the file's stem.
        tolerance: largest absolute difference from PyTorch that passes. The default is for values of unit scale.
        verify_inputs: further inputs by name to verify on, one mapping or several, as arrays or tensors
            `[batch, time, ...]`. Names are the spec's: those of forward's parameters, or `input_names`.
        input_names: names for the inputs, in the order of forward's parameters without states.
        output_names: names for the outputs, flattened in the order of the return value without states.
        allow_non_finite_inputs: let a server accept NaN and infinities for this model.
        external_data: put the weights beside the model; done in any case over 2 GB.
        overwrite: replace a model that is there.
        quiet: do not print the verifier's figures.

    Raises:
        CaptureError: the module cannot be streamed; the message names the submodule and the reason.
        VerificationFailed: the captured model does not answer as PyTorch does. Nothing was written.
        WriteRefused: the place is taken, or cannot be written.
    """
    from conveyor_export import package

    if not tolerance >= 0:
        raise ExportError(f"tolerance is {tolerance}, and must be 0 or more")
    file = package.target(path, overwrite=overwrite)
    # From here on with torch and onnxruntime.
    from conveyor_export.capture import capture
    from conveyor_export.vectors import make_vectors
    from conveyor_export.verify import verify
    from conveyor_export.verify_table import format_verification

    model = capture(
        module,
        example_inputs,
        name=name or (file.stem if file == Path(path) else file.resolve().parent.parent.name),
        input_names=input_names,
        output_names=output_names,
        allow_non_finite_inputs=allow_non_finite_inputs,
    )
    verification = verify(model, tolerance=tolerance, extra_inputs=_arrays(verify_inputs))
    if not quiet:
        print(format_verification(verification))
    vectors = make_vectors(model, tolerance=tolerance)
    package.write(model, verification, path, vectors=vectors, external_data=external_data, overwrite=overwrite)
    spec, file = package.read(file)
    return ExportResult(spec=spec, path=file, verification=verification)


def _arrays(verify_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Inputs by name as numpy arrays, whatever they came as."""
    import numpy as np
    import torch

    several = [verify_inputs] if isinstance(verify_inputs, Mapping) else list(verify_inputs or ())
    return [
        {
            name: value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            for name, value in inputs.items()
        }
        for inputs in several
    ]
