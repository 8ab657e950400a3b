"""The judge of streamability: a captured graph in onnxruntime against its module in PyTorch.

Invariant: a model passes only when every way of feeding it (whole, alone, chunked, one by one, ragged) gives every
output and every state within the tolerance, on random inputs and on the user's own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2

from conveyor_export.step_model import StepModel
from conveyor_export.verify_cause import failure
from conveyor_export.verify_graph import Graph, onnxruntime_version
from conveyor_export.verify_inputs import given_sample, random_sample, resampled
from conveyor_export.verify_modes import run_modes
from conveyor_export.verify_truth import Figure, Truth

# Largest absolute difference allowed in float32 on inputs of unit scale.
TOLERANCE = 1e-5


def verify(
    model: StepModel,
    *,
    tolerance: float = TOLERANCE,
    extra_inputs: Sequence[Mapping[str, Array]] | None = None,
    seed: int = 0,
) -> spec_pb2.Verification:
    """Runs every mode on random inputs, on the example and on `extra_inputs`, and returns the figures.

    Takes about a second for a small model; the module runs in the caller's thread.

    Args:
        model: what capture made.
        tolerance: largest absolute difference allowed, at least 0.
        extra_inputs: further inputs by name, `[batch, time, *shape]` or `[batch, *shape]`.
        seed: of the random inputs, chunk sizes and lengths.

    Raises:
        VerificationFailed: something differs by more than the tolerance, is NaN, or cannot be run. The message names
            the mode, the output, the first layer that differs, and what usually causes it.
    """
    graph = Graph(model)
    rng = np.random.default_rng(seed)
    figures: dict[tuple[str, str, str], Figure] = {}
    for truth in _truths(model, extra_inputs or (), rng):
        found = run_modes(model, graph, truth, rng)
        for figure in found:
            key = figure.inputs, figure.mode, figure.tensor
            figures[key] = _worse(figures[key], figure) if key in figures else figure
        if any(figure.difference > tolerance for figure in found):
            raise failure(model.spec, truth, found, _verification(tolerance, list(figures.values())))
    return _verification(tolerance, list(figures.values()))


def _truths(model: StepModel, extra_inputs: Sequence[Mapping[str, Array]], rng: np.random.Generator) -> list[Truth]:
    example = Truth(model, given_sample(model.spec, "example", model.example))
    given = [Truth(model, given_sample(model.spec, "given", inputs)) for inputs in extra_inputs]
    random = Truth(model, random_sample(model, rng))
    if not random.finite() and example.finite():
        # A module such as log-energy features is not defined on the whole line; its own values are.
        random = Truth(model, resampled(model, random.sample, rng))
    return [random, example, *given]


def _worse(left: Figure, right: Figure) -> Figure:
    worse = left if left.difference >= right.difference else right
    worse.time_steps = left.time_steps + right.time_steps
    return worse


def _verification(tolerance: float, figures: Sequence[Figure]) -> spec_pb2.Verification:
    return spec_pb2.Verification(
        tolerance=tolerance,
        onnxruntime_version=onnxruntime_version(),
        cases=[
            spec_pb2.VerificationCase(
                mode=figure.mode,
                tensor=figure.tensor,
                max_abs_difference=figure.difference,
                time_steps=figure.time_steps,
                inputs=figure.inputs,
            )
            for figure in figures
        ],
    )
