"""From a module and one example to its Plan: signature, axes, session state, user outputs."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conveyor_export.capture.calls import CELL
from conveyor_export.capture.custom import find_custom, returned_as
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layout import Layout, Pace, Prober, find_layout
from conveyor_export.capture.outputs import OutputLeaf, find_outputs, flatten, output_name, returned_stacks
from conveyor_export.capture.plan import CustomState, Plan, StateArgument, UserOutput, name_layers, no_state
from conveyor_export.capture.signature import Signature
from conveyor_export.capture.states import Flows, check_time, find_flows, find_states, parameter_of
from conveyor_export.capture.stepping import every_step_calls_all, refuse, steps_add_up


def make_plan(
    module: nn.Module,
    example_inputs: Any,
    name: str,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Plan:
    """Observes the module and plans its step model; the caller isolates the module.

    Raises:
        CaptureError: the module cannot be streamed, with the reason.
    """
    prober = Prober(module, Signature(module, example_inputs))
    layout = find_layout(prober)
    leaves = find_outputs(prober, layout)
    flows = find_flows(prober, layout, layout.time if layout.pace is Pace.SEQUENCE else 1)
    arguments, custom = _explicit(prober, layout, flows, leaves)
    scan = layout.pace is not Pace.SEQUENCE or bool(custom)
    if scan and layout.pace is Pace.SEQUENCE:
        flows = find_flows(prober, layout, 1)
    root = type(module).__name__.lower()
    custom_leaves = frozenset(state.leaf for state in custom)
    states, ambiguous = find_states(prober, layout, flows, arguments, custom=custom_leaves, root=root)
    if ambiguous:
        return make_plan(module, _omit(prober, arguments, ambiguous), name, input_names, output_names)
    calls = tuple(flows.observation.calls)
    if layout.pace is Pace.SEQUENCE:
        check_time(calls, 1 if scan else layout.time)
    if layout.pace is Pace.SINGLE and {state.key for state in states} != {key for a in arguments for key in a.pieces}:
        raise CaptureError(
            "forward() takes one time step and makes the state anew inside: nothing is remembered between calls",
            path=calls[0].path,
            advice="Pass the state through forward's signature and return the new one, or take [batch, time, ...]",
        )
    state_leaves = custom_leaves | {item.leaf for item in arguments}
    inputs = tuple(
        leaf.name
        for leaf in prober.signature.leaves
        if leaf.name not in state_leaves | {layout.lengths} and layout.axes[leaf.name].batch is not None
    )
    plan = Plan(
        module=module,
        name=name or root,
        signature=prober.signature,
        layout=layout,
        calls=calls,
        scan=scan,
        inputs=inputs,
        input_names=_rename(inputs, input_names),
        outputs=_user_outputs(prober, layout, flows, leaves, arguments=arguments, custom=custom, names=output_names),
        layer_states=states,
        custom_states=custom,
        arguments=arguments,
        layer_paths=name_layers(calls, root),
    )
    problem = next((item.leaf.problem for item in plan.outputs if item.leaf.problem), "") if scan else ""
    if problem:
        raise CaptureError(problem, advice="Return one value for each time step, or the last one")
    if scan and not states and not custom:
        raise no_state(plan)
    if not scan or layout.pace is Pace.SINGLE or steps_add_up(plan, prober):
        return plan
    carried = replace(plan, carried=True)
    if layout.pace is Pace.LOOP and not custom and every_step_calls_all(plan, prober) and steps_add_up(carried, prober):
        return carried
    raise refuse(plan, prober)


def check_module(module: nn.Module) -> None:
    """Refuses modules that cannot be watched or run here.

    Raises:
        CaptureError: compiled by TorchScript, or not on the CPU.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                "it is compiled by TorchScript, which hides its recurrent calls",
                path=path,
                advice="Give the nn.Module that it was compiled from",
            )
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise CaptureError(
                f"{path!r} is on device {tensor.device}", advice="Move the module and the example inputs with .cpu()"
            )


def _explicit(
    prober: Prober, layout: Layout, flows: Flows, leaves: list[OutputLeaf]
) -> tuple[tuple[StateArgument, ...], tuple[CustomState, ...]]:
    """Arguments that are states of layers, and those that are states of the module's own making."""
    output = flows.observation.output
    arguments = tuple(
        item for item in flows.arguments if _layer_outputs(prober, layout, flows, item, leaves) is not None
    )
    layer_leaves = {item.leaf for item in arguments}
    parameters = []
    for leaf in prober.signature.leaves:
        axes = layout.axes[leaf.name]
        if leaf.name in layer_leaves or leaf.name == layout.lengths or axes.batch is None or axes.time is not None:
            continue
        if leaf.parameter not in parameters and not _is_primary(prober, layout, leaf.name):
            parameters.append(leaf.parameter)
    taken = _argument_outputs(prober, layout, flows, arguments, leaves)
    recurrent = bool(flows.observation.calls)
    custom = find_custom(
        prober, layout, parameters, output, [leaf for leaf in leaves if leaf.index not in taken], recurrent=recurrent
    )
    own = {state.leaf for state in custom}
    return tuple(item for item in arguments if item.leaf not in own), custom


def _is_primary(prober: Prober, layout: Layout, name: str) -> bool:
    """The first input that is no lengths: it is never state."""
    return name == next(leaf.name for leaf in prober.signature.leaves if leaf.name != layout.lengths)


def _layer_outputs(
    prober: Prober, layout: Layout, flows: Flows, argument: StateArgument, leaves: list[OutputLeaf]
) -> set[int] | None:
    """Positions of returned tensors that are the new state of an argument's layers.

    None where forward() returns something else in the argument's place: the module then changes the state itself.
    """
    axes = layout.axes[argument.leaf]
    finals = [flows.observation.calls[call].final[layer][role] for call, layer, role in argument.pieces]
    expected = axes.to_module(torch.stack(finals, dim=1) if argument.stacked else finals[0])
    values = flatten(flows.observation.output)
    same = {
        index for index, value in enumerate(values) if value.shape == expected.shape and torch.equal(value, expected)
    }
    parameter = parameter_of(prober, argument.leaf)
    alike = returned_as(prober, layout, parameter, flows.observation.output, leaves)
    return None if alike and not same else same


def _argument_outputs(
    prober: Prober, layout: Layout, flows: Flows, arguments: Sequence[StateArgument], leaves: list[OutputLeaf]
) -> set[int]:
    return {position for item in arguments for position in _layer_outputs(prober, layout, flows, item, leaves) or ()}


def _omit(prober: Prober, arguments: Sequence[StateArgument], ambiguous: frozenset[str]) -> dict[str, Any]:
    """Example inputs without the states whose rows differ: the module then makes its own fresh state."""
    layer_leaves = {item.leaf for item in arguments}
    for parameter in ambiguous:
        others = [leaf.name for leaf in prober.signature.leaves if leaf.parameter == parameter]
        if not prober.signature.defaults_to_none(parameter) or not layer_leaves.issuperset(others):
            raise CaptureError(
                f"the rows of state {parameter!r} in the example inputs differ, and a fresh session has one row",
                advice="Give the state that a sequence starts from, usually zeros",
            )
    return prober.signature.without(ambiguous)


def _user_outputs(
    prober: Prober,
    layout: Layout,
    flows: Flows,
    leaves: list[OutputLeaf],
    *,
    arguments: Sequence[StateArgument],
    custom: Sequence[CustomState],
    names: Sequence[str] | None,
) -> tuple[UserOutput, ...]:
    """The outputs that are not merely the new state; where nothing else is returned, the hidden state is the output."""
    observation = flows.observation
    hidden = {state.output for state in custom} | returned_stacks(observation)
    hidden |= _argument_outputs(prober, layout, flows, arguments, leaves)
    visible = [leaf for leaf in leaves if leaf.index not in hidden]
    if not visible:
        cells = _cell_positions(flows)
        visible = [leaf for leaf in leaves if leaf.index not in cells]
    if names is not None and len(names) != len(visible):
        raise CaptureError(
            f"{len(names)} output_names for {len(visible)} outputs "
            f"({', '.join(output_name(leaf.keys) for leaf in visible)})",
            advice="Name the outputs that are not state",
        )
    return tuple(UserOutput(name, leaf) for name, leaf in zip(names or _default_names(visible), visible, strict=True))


def _cell_positions(flows: Flows) -> set[int]:
    cells = [layer[CELL] for call in flows.observation.calls for layer in call.final if CELL in layer]
    stacks = [
        torch.stack([layer[CELL] for layer in call.final])
        for call in flows.observation.calls
        if call.final and CELL in call.final[0]
    ]
    return {
        index
        for index, value in enumerate(flatten(flows.observation.output))
        if any(value.shape == cell.shape and torch.equal(value, cell) for cell in [*cells, *stacks])
    }


def _default_names(leaves: Sequence[OutputLeaf]) -> list[str]:
    positional = [leaf for leaf in leaves if all(isinstance(key, int) for key in leaf.keys)]
    spoken = [_spoken(leaf.keys) for leaf in leaves]
    names = []
    for leaf, keys in zip(leaves, spoken, strict=True):
        if leaf not in positional:
            names.append(output_name(keys if spoken.count(keys) == 1 else leaf.keys))
        else:
            names.append("output" if len(positional) == 1 else f"output_{positional.index(leaf)}")
    return names


def _spoken(keys: Sequence[str | int]) -> tuple[str | int, ...]:
    """Without the positions before the first name: in `({"logits": y}, state)` the user said `logits`."""
    return tuple(itertools.dropwhile(lambda key: isinstance(key, int), keys))


def _rename(names: Sequence[str], given: Sequence[str] | None) -> dict[str, str]:
    if given is None:
        return {name: name for name in names}
    if len(given) != len(names):
        raise CaptureError(
            f"{len(given)} input_names for {len(names)} inputs ({', '.join(names)})",
            advice="Name the inputs that are neither state nor lengths",
        )
    return dict(zip(names, given, strict=True))
