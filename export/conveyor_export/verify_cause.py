"""Says what went wrong when a graph is not its module, and what usually causes it.

Invariant: a cause is named from what was measured: which modes fail, and whether PyTorch agrees with itself.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.v1 import spec_pb2

from conveyor_export.errors import VerificationFailed
from conveyor_export.verify_modes import MODES
from conveyor_export.verify_table import format_verification
from conveyor_export.verify_truth import Figure, Truth

# A difference of so few parts of the largest value is float32 rounding, carried through some layers.
_ROUNDING = 1e-5


# Causes that follow from the first failing mode alone.
_BY_MODE = {
    "whole": (
        "Even one call over the whole sequence differs, so some operation is not what it is in PyTorch: usually a "
        "layer's weights or options were read wrongly, or forward() branches on values. Please report the module."
    ),
    "alone": (
        "A row's answers depend on the other rows of its batch: usually a mean or a norm over the batch axis, or a "
        "batch norm in training mode. Sessions must not see each other."
    ),
    "ragged": (
        "Only rows of different lengths differ: padding reaches a row's answers, or a row without new time steps loses "
        "its state. Usually an operation mixes time steps without knowing the lengths."
    ),
}


def failure(
    spec: spec_pb2.ModelSpec,
    truth: Truth,
    figures: Sequence[Figure],
    verification: spec_pb2.Verification,
) -> VerificationFailed:
    """The error for one sample's figures, of which at least one is over the tolerance.

    Names the first mode that fails, the output, the first layer whose state differs, and the usual cause.
    """
    tolerance = verification.tolerance
    bad = [figure for figure in figures if figure.difference > tolerance]
    mode = min((figure.mode for figure in bad), key=MODES.index)
    group = {figure.tensor: figure for figure in bad if figure.mode == mode}
    output = next((group[item.name] for item in spec.outputs if item.name in group), None)
    state = next((item for item in spec.states if item.name in group), None)
    lines = [f"the captured graph does not answer as PyTorch does in mode {mode!r} ({truth.sample.kind} inputs)"]
    if output is not None:
        lines.append(f"  output {_describe(output, tolerance)}")
    if state is not None:
        layer = f"layer {state.layer!r}, state" if state.layer else "state"
        lines.append(f"  first that differs: {layer} {_describe(group[state.name], tolerance)}")
    elif spec.states:
        lines.append("  every state agrees: the difference arises after the last recurrent layer, or beside them")
    lines.append(f"  {_cause(truth, mode, group, tolerance)}")
    return VerificationFailed("\n".join([*lines, format_verification(verification)]), verification)


def _describe(figure: Figure, tolerance: float) -> str:
    if figure.nan:
        return f"{figure.tensor!r}: {figure.nan} gives NaN at {figure.where}"
    return f"{figure.tensor!r} differs by {figure.difference:.3g} at {figure.where} (tolerance {tolerance:g})"


def _cause(truth: Truth, mode: str, group: dict[str, Figure], tolerance: float) -> str:
    worst = max(group.values(), key=lambda figure: figure.difference)
    if any(figure.nan == "PyTorch" for figure in group.values()):
        return f"PyTorch itself gives NaN on {truth.sample.kind} inputs: mend the module, or give other inputs."
    if worst.difference <= _ROUNDING * worst.scale:
        return (
            f"The difference is {worst.difference / worst.scale:.1g} of the largest value ({worst.scale:.3g}), as "
            "float32 rounding makes: the tolerance is for values of unit scale. Scale the module's values, or set a "
            f"tolerance such as {_round_up(worst.difference):g}."
        )
    if _random(truth):
        return (
            "Two runs of the module in PyTorch differ: forward() draws random numbers or changes the module. "
            "Remove that from the forward pass."
        )
    return _BY_MODE.get(mode) or _split_cause(truth, mode, tolerance)


def _split_cause(truth: Truth, mode: str, tolerance: float) -> str:
    """Why a split sequence differs where the whole agrees: the module looks ahead, or the graph forgets."""
    if not _causal(truth, tolerance):
        return (
            f"{mode} differs from whole although whole agrees, and PyTorch's own answers for the first time steps "
            "change when the later ones are cut off: the module uses the future or the whole input, as do "
            "bidirectional layers, attention or means over time, and convolutions that are not causal. It cannot be "
            "streamed as it is."
        )
    return (
        f"{mode} differs from whole although whole agrees: the graph forgets something from call to call, or the "
        "module uses the future or the whole input. Usually a memory other than a recurrent layer's state, such as a "
        "running sum or a position counter: pass it through forward() as state."
    )


def _causal(truth: Truth, tolerance: float) -> bool:
    """Whether PyTorch gives the first half of the sequence the same answers when the second is cut off."""
    time = truth.sample.time
    half = max(1, time // 2)
    whole, prefix = truth.ask(None, time).outputs, truth.ask(None, half).outputs
    return all(
        np.allclose(whole[name][:, :half].astype(np.float64), early.astype(np.float64), rtol=0, atol=tolerance)
        for name, early in prefix.items()
        if early.shape != whole[name].shape  # else it has no time axis, and may change
    )


def _random(truth: Truth) -> bool:
    """Whether the module's answers depend on chance, or on how often it was asked."""
    import torch

    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            torch.manual_seed(seed)
            runs.append(truth.ask(None, truth.sample.time).outputs)
    first, second = runs
    return any(not np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten, at least twice the value."""
    exponent = np.floor(np.log10(2 * value))
    return float(next(step * 10**exponent for step in (1, 2, 5, 10) if step * 10**exponent >= 2 * value))
