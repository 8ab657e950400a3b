"""What PyTorch says: the original module on whole sequences from fresh state, and the state that it ends with."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conveyor_export.capture.calls import RecurrentCall
from conveyor_export.capture.isolate import isolated
from conveyor_export.capture.layout import Pace
from conveyor_export.capture.observe import Observation, observe
from conveyor_export.capture.outputs import flatten
from conveyor_export.capture.plan import Plan
from conveyor_export.capture.quiet import quiet
from conveyor_export.step_model import Arrays, Reference

# Reads further final states, by name, off one observed run.
Contexts = Callable[[Observation], Mapping[str, Tensor]]


def make_reference(plan: Plan, contexts: Contexts) -> Callable[[Arrays], Reference]:
    """The StepModel.reference of a plan."""

    def reference(inputs: Arrays) -> Reference:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(inputs[plan.input_names[name]])) for name in plan.inputs}
        with isolated(plan.module), quiet():
            if plan.layout.pace is Pace.SINGLE:
                return _stepped(plan, tensors)
            return _whole(plan, tensors, contexts)

    return reference


def example_arrays(plan: Plan) -> dict[str, NDArray[np.generic]]:
    """The user's example inputs by public name and in public order of axes; a single step becomes one time step."""
    arrays = {}
    for leaf in plan.signature.leaves:
        if leaf.name in plan.inputs:
            axes = plan.layout.axes[leaf.name]
            public = axes.to_public(leaf.value, leaf.value.shape[axes.batch or 0])
            if plan.layout.pace is Pace.SINGLE:
                public = public.unsqueeze(1)
            arrays[plan.input_names[leaf.name]] = public.contiguous().numpy().copy()
    return arrays


def _whole(plan: Plan, inputs: Mapping[str, Tensor], contexts: Contexts) -> Reference:
    timed = next(name for name in plan.inputs if plan.layout.axes[name].time is not None)
    batch, time = inputs[timed].shape[0], inputs[timed].shape[1]
    values = _values(plan, inputs, batch, time)
    args, kwargs = plan.signature.call(values)
    observation = observe(plan.module, args, kwargs)
    returned = flatten(observation.output)
    outputs = {item.name: _array(item.leaf.axes.to_public(returned[item.leaf.index], batch)) for item in plan.outputs}
    finals = _carried(plan, values, time) if plan.carried else layer_finals(plan, observation.calls, time)
    states = {name: _array(value) for name, value in finals.items()}
    states |= {name: _array(value) for name, value in contexts(observation).items()}
    for custom in plan.custom_states:
        states[custom.name] = _array(plan.layout.axes[custom.leaf].to_public(returned[custom.output], batch))
    return Reference(outputs, states)


def _stepped(plan: Plan, inputs: Mapping[str, Tensor]) -> Reference:
    """A module of one time step: the caller's loop, with the state handed from call to call."""
    batch, time = next(iter(inputs.values())).shape[:2]
    explicit = plan.initial_arguments(batch)
    collected: dict[str, list[Tensor]] = defaultdict(list)
    finals: dict[str, Tensor] = {}
    for step in range(time):
        values = _values(plan, {name: value[:, step] for name, value in inputs.items()}, batch, 1) | explicit
        args, kwargs = plan.signature.call(values)
        observation = observe(plan.module, args, kwargs)
        returned = flatten(observation.output)
        for item in plan.outputs:
            collected[item.name].append(item.leaf.axes.to_public(returned[item.leaf.index], batch))
        by_key = {
            (call, layer, role): states[role]
            for call, item in enumerate(observation.calls)
            for layer, states in enumerate(item.final)
            for role in item.roles
        }
        explicit = {item.leaf: plan.assemble(item, by_key) for item in plan.arguments}
        explicit |= {state.leaf: returned[state.output] for state in plan.custom_states}
        finals = {state.name: by_key[state.key] for state in plan.layer_states}
        for custom in plan.custom_states:
            finals[custom.name] = plan.layout.axes[custom.leaf].to_public(returned[custom.output], batch)
    outputs = {name: _array(torch.stack(values, dim=1)) for name, values in collected.items()}
    return Reference(outputs, {name: _array(value) for name, value in finals.items()})


def _values(plan: Plan, inputs: Mapping[str, Tensor], batch: int, time: int) -> dict[str, Tensor]:
    values = {leaf.name: leaf.value for leaf in plan.signature.leaves}
    values |= {name: plan.layout.axes[name].to_module(value) for name, value in inputs.items()}
    values |= plan.initial_arguments(batch)
    if plan.layout.lengths is not None:
        values[plan.layout.lengths] = values[plan.layout.lengths].new_full((batch,), time)
    return values


def layer_finals(plan: Plan, calls: Sequence[RecurrentCall], time: int) -> dict[str, Tensor]:
    """New states by name after a run of `time` steps.

    A module that loops over time repeats a path's calls once for every step: the last round holds the final states.
    """
    per_step = Counter(call.path for call in plan.calls)
    by_path: dict[str, list[RecurrentCall]] = defaultdict(list)
    for call in calls:
        by_path[call.path].append(call)
    ordinal: Counter[str] = Counter()
    last: dict[int, RecurrentCall] = {}
    for index, call in enumerate(plan.calls):
        made, each = by_path[call.path], per_step[call.path]
        looped = len(made) == each * time
        last[index] = made[(len(made) - each if looped else 0) + ordinal[call.path]]
        ordinal[call.path] += 1
    return {state.name: last[state.call].final[state.layer][state.role] for state in plan.layer_states}


def _carried(plan: Plan, values: Mapping[str, Tensor], time: int) -> dict[str, Tensor]:
    """The states that one more step would start from; its input is the last step's, and does not matter."""
    longer = {}
    for name, value in values.items():
        axis = plan.layout.axes[name].time
        longer[name] = value if axis is None else torch.cat([value, value.narrow(axis, time - 1, 1)], axis)
        if name == plan.layout.lengths:
            longer[name] = value + 1
    args, kwargs = plan.signature.call(longer)
    calls = observe(plan.module, args, kwargs).calls[len(plan.calls) * time :]
    return {state.name: calls[state.call].initial[state.layer][state.role] for state in plan.layer_states}


def _array(value: Tensor) -> NDArray[np.generic]:
    return value.detach().contiguous().numpy().copy()
