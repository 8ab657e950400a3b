"""Scan form's proof in PyTorch: time steps taken one by one give what the module gives on the whole sequence.

Where they do not, the module does more with time than its recurrent state tells, and this says what.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conveyor_export.capture.calls import RecurrentCall
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.facts import path_of
from conveyor_export.capture.layout import BATCH, Prober
from conveyor_export.capture.mixing import arguments_of, mixing_reason, operator_of
from conveyor_export.capture.observe import Observation
from conveyor_export.capture.outputs import flatten
from conveyor_export.capture.plan import Plan
from conveyor_export.capture.trace import StepGraph, export_graph, run_traced

_TIME = 5
_TOLERANCE = 1e-4


def steps_add_up(plan: Plan, prober: Prober) -> bool:
    """True where the outputs of single steps are those of the whole sequence."""
    values = _values(plan, prober, _TIME)
    whole = flatten(prober.run(values).output)
    stepped = _step_all(plan, values)
    for item, (first, *others) in zip(plan.outputs, zip(*stepped, strict=True), strict=False):
        expected = item.leaf.axes.to_public(whole[item.leaf.index], BATCH)
        got = torch.stack([first, *others], dim=1) if item.leaf.has_time else (others or [first])[-1]
        if got.shape != expected.shape or not torch.allclose(got, expected, atol=_TOLERANCE, rtol=_TOLERANCE):
            return False
    return True


def every_step_calls_all(plan: Plan, prober: Prober) -> bool:
    """True where a second step repeats all recurrent calls of the first, and nothing else."""
    calls = prober.run(_values(plan, prober, 2)).calls
    return [call.path for call in calls] == 2 * [call.path for call in plan.calls]


def refuse(plan: Plan, prober: Prober) -> CaptureError:
    """Why the steps do not add up: an operator over time, or something carried beside the recurrent state."""
    reason = _mixing(plan, prober)
    if reason is not None:
        return reason
    call = _first_difference(plan, prober)
    return CaptureError(
        "its single time steps do not add up to the whole sequence: something else than the state of a recurrent call "
        "is carried from step to step, or a step uses the first, the last or the number of steps",
        path=call.path if call is not None else "",
        advice="Pass everything that is carried through forward's signature and return the new value",
    )


def _values(plan: Plan, prober: Prober, time: int) -> dict[str, Tensor]:
    return prober.draw(plan.layout, BATCH, time) | plan.initial_arguments(BATCH)


def _step_all(plan: Plan, values: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Outputs of each step, the state handed over in between."""
    graph = StepGraph(plan, eager=True)
    public = {name: plan.layout.axes[name].to_public(values[name], BATCH) for name in plan.inputs}
    states = [state.initial.expand(BATCH, -1) for state in plan.layer_states]
    customs = [state.initial.expand(BATCH, *state.initial.shape) for state in plan.custom_states]
    made = []
    for step in range(_TIME):
        inputs = [
            value[:, step] if plan.layout.axes[name].time is not None else value for name, value in public.items()
        ]
        returned = graph(inputs, None, states, customs)
        count = len(plan.outputs)
        made.append(returned[:count])
        states, customs = list(returned[count:][: len(states)]), list(returned[count + len(states) :])
    return made


def _mixing(plan: Plan, prober: Prober) -> CaptureError | None:
    """An operator that mixes time steps, found in a trace of a number of steps that no other size has."""
    sizes = {size for tensor in plan.module.state_dict().values() for size in tensor.shape}
    sizes |= {size for leaf in plan.signature.leaves for size in leaf.value.shape}
    time = next(number for number in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43) if number not in sizes)
    try:
        program = export_graph(_Whole(plan), (_values(plan, prober, time),), None)
    except CaptureError:
        # A module that cannot be traced at a fixed size gets the general reason.
        return None
    axes: dict[torch.fx.Node, tuple[int, ...]] = {}
    ranks: dict[torch.fx.Node, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            axes[node] = tuple(axis for axis, size in enumerate(value.shape) if size == time)
            ranks[node] = value.dim()
        reason = mixing_reason(node, axes, ranks) or _convolution(node, axes) if node.op == "call_function" else None
        if reason:
            advice = "Only what depends on past time steps can be streamed"
            return CaptureError(reason, path=path_of(node), advice=advice)
    return None


def _convolution(node: torch.fx.Node, axes: dict[torch.fx.Node, tuple[int, ...]]) -> str | None:
    """Contexts need all recurrent layers to run over whole sequences."""
    weight = arguments_of(node).get("weight")
    if not operator_of(node).startswith("conv") or not isinstance(weight, torch.fx.Node):
        return None
    kernel = weight.meta["val"].shape
    if any(axis >= 2 and kernel[axis] > 1 for axis in axes.get(node, ())):
        return (
            "it convolves over time in a module that loops over time in Python, so its left context cannot be kept; "
            "a recurrent layer over the whole sequence in place of the loop can be streamed"
        )
    return None


class _Whole(nn.Module):
    """The user's module on named inputs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.module = plan.module
        self._plan = plan

    def forward(self, values: dict[str, Tensor]) -> Any:
        return run_traced(self._plan, values)


def _first_difference(plan: Plan, prober: Prober) -> RecurrentCall | None:
    """The first recurrent call of the second step whose state is not what the first step's call returned."""
    observation: Observation = prober.run(_values(plan, prober, 2))
    each = len(plan.calls)
    for before, after in zip(observation.calls, observation.calls[each:], strict=False):
        for layer, states in enumerate(before.final):
            if any(not torch.equal(states[role], after.initial[layer][role]) for role in before.roles):
                return after
    return None
