"""Capture: an unmodified, trained torch.nn.Module becomes a step model with explicit state.

The module is watched while it runs (observe, layout, states), planned (plan), traced by torch.export with its states as
inputs and outputs (lift, trace), and written as ONNX (emit). Nothing here judges the numbers: the verifier does.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from conveyor_export.capture.build import build_scan, build_sequence
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.isolate import isolated
from conveyor_export.capture.planning import check_module, make_plan
from conveyor_export.capture.quiet import quiet
from conveyor_export.step_model import StepModel

__all__ = ["CaptureError", "capture"]


def capture(
    module: nn.Module,
    example_inputs: Any,
    *,
    name: str = "",
    output_names: Sequence[str] | None = None,
    input_names: Sequence[str] | None = None,
    allow_non_finite_inputs: bool = False,
) -> StepModel:
    """Turns a module into a step model; the module is left as it was, also after an error.

    Args:
        module: on the CPU, in float32. It runs in eval mode here.
        example_inputs: one batch as a tensor, a tuple of arguments or a dict of keyword arguments. Sequences are
            `[batch, time, ...]` or `[time, batch, ...]` as the module takes them. State arguments hold what a fresh
            session starts from, or are left out where they default to None.
        name: ModelSpec.name; the class name in lower case if empty.
        output_names: names of the outputs that are not state, in order.
        input_names: names of the inputs that are neither state nor lengths, in order.
        allow_non_finite_inputs: the server lets NaN and infinities in.

    Returns:
        The step model, not yet verified. Its `reference` keeps the module alive; it belongs to the caller's thread.

    Raises:
        CaptureError: the module cannot be streamed; the message names the submodule, the reason and what to do.
    """
    try:
        check_module(module)
        with isolated(module), quiet():
            plan = make_plan(module, example_inputs, name, input_names, output_names)
            build = build_scan if plan.scan else build_sequence
            return build(plan, allow_non_finite_inputs=allow_non_finite_inputs)
    except CaptureError as error:
        raise error.about(type(module).__name__) from error
