"""The step graph as an exported program: the module's own forward with its states as inputs and outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from conveyor_export.capture.calls import LayerStates, LayerWeights
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layers import OnnxLayer, run_layer, run_torch, to_onnx
from conveyor_export.capture.layout import BATCH
from conveyor_export.capture.lift import Lift, RunLayer
from conveyor_export.capture.outputs import flatten
from conveyor_export.capture.paths import ModulePaths
from conveyor_export.capture.plan import Plan
from conveyor_export.capture.quiet import quiet


class StepGraph(nn.Module):
    """Wraps the user's module for tracing; shares its parameters and changes nothing in it.

    In sequence form forward() takes `[batch, time, *row]` inputs and runs all time steps; in scan form it takes
    `[batch, *row]` and runs one.

    Args:
        plan: of the module. eager: compute recurrent calls by torch's own functions, to run without tracing.
    """

    def __init__(self, plan: Plan, *, eager: bool = False) -> None:
        super().__init__()
        self.module = plan.module
        self._plan = plan
        self._eager = eager
        self.layers: dict[tuple[int, int], OnnxLayer] = {}
        self._names: dict[tuple[int, int], dict[str, str]] = {}
        tied: dict[tuple[int, ...], tuple[int, int]] = {}
        for index, call in enumerate(plan.calls):
            for number, weights in enumerate(call.weights):
                self._add_layer(
                    (index, number), to_onnx(call.kind, plan.layer_paths[index, number], weights), tied, weights
                )

    def _add_layer(
        self,
        key: tuple[int, int],
        layer: OnnxLayer,
        tied: dict[tuple[int, ...], tuple[int, int]],
        weights: LayerWeights,
    ) -> None:
        """Registers a layer's constants once, however often its weights are used."""
        self.layers[key] = layer
        identity = tuple(0 if tensor is None else tensor.data_ptr() for tensor in weights.tensors)
        first = tied.setdefault(identity, key)
        if first != key:
            self._names[key] = self._names[first]
            return
        self._names[key] = {}
        for part in ("w", "r", "b", "p"):
            tensor = getattr(layer, part)
            if tensor is not None:
                name = f"layer_{key[0]}_{key[1]}_{part}"
                self.register_buffer(name, tensor)
                self._names[key][part] = name

    @property
    def constant_names(self) -> dict[str, str]:
        """Initializer name in the ONNX graph by buffer name: `lstm.0.W`."""
        return {
            name: f"{self.layers[key].path}.{part.upper()}"
            for key, parts in self._names.items()
            for part, name in reversed(parts.items())
            if name.startswith(f"layer_{key[0]}_{key[1]}_")
        }

    def forward(
        self, inputs: Sequence[Tensor], lengths: Tensor | None, states: Sequence[Tensor], customs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """User outputs, then new layer states, then new custom states, all with batch first."""
        plan = self._plan
        same_sizes(inputs, timed_inputs(plan), (lengths, *states, *customs))
        batch = inputs[0].shape[0]
        given = {state.key: value for state, value in zip(plan.layer_states, states, strict=True)}
        values = self._arguments(inputs, lengths, given, customs, batch)

        def run(index: int, number: int, x: Tensor, state: LayerStates) -> tuple[Tensor, LayerStates]:
            if self._eager:
                return run_torch(plan.calls[index % len(plan.calls)], number, x, state)
            key = (index % len(plan.calls), number)
            constants = {part: getattr(self, name) for part, name in self._names[key].items()}
            return run_layer(self.layers[key], constants, x, state, lengths)

        lift = Lift(plan.calls, given, run, values.get(plan.layout.lengths or ""))
        with lift:
            returned = flatten(run_traced(plan, values))
        new_states = self._carried(values, given, run) if plan.carried else lift.new
        outputs = [self._output(returned[item.leaf.index], item.leaf.axes, batch) for item in plan.outputs]
        new = [self._guard(new_states[state.key], given[state.key], lengths) for state in plan.layer_states]
        custom = [plan.layout.axes[state.leaf].to_public(returned[state.output], batch) for state in plan.custom_states]
        return (*outputs, *new, *custom)

    def _carried(
        self, values: dict[str, Tensor], given: dict[tuple[int, int, str], Tensor], run: RunLayer
    ) -> dict[tuple[int, int, str], Tensor]:
        """The states that a second step starts from, where the module's loop changes them between its calls.

        The second step's input does not matter: nothing that it computes is used.
        """
        plan, axes = self._plan, self._plan.layout.axes
        twice = {
            name: torch.cat([value, value], axes[name].time or 0) if axes[name].time is not None else value
            for name, value in values.items()
        }
        if plan.layout.lengths is not None:
            twice[plan.layout.lengths] = 2 * values[plan.layout.lengths]
        lift = Lift(plan.calls * 2, given, run, twice.get(plan.layout.lengths or ""))
        with lift:
            run_traced(plan, twice)
        each = len(plan.calls)
        return {key: lift.begun[key[0] + each, key[1], key[2]] for key in given}

    def _arguments(
        self,
        inputs: Sequence[Tensor],
        lengths: Tensor | None,
        given: dict[tuple[int, int, str], Tensor],
        customs: Sequence[Tensor],
        batch: Any,
    ) -> dict[str, Tensor]:
        """Module inputs by leaf name from the graph's inputs."""
        plan = self._plan
        axes = plan.layout.axes
        values = {leaf.name: leaf.value for leaf in plan.signature.leaves}
        for name, value in zip(plan.inputs, inputs, strict=True):
            step = value.unsqueeze(1) if plan.scan and axes[name].time is not None else value
            values[name] = axes[name].to_module(step)
        for argument in plan.arguments:
            values[argument.leaf] = plan.assemble(argument, given)
        for state, value in zip(plan.custom_states, customs, strict=True):
            values[state.leaf] = axes[state.leaf].to_module(value)
        if plan.layout.lengths is not None:
            leaf = next(leaf for leaf in plan.signature.leaves if leaf.name == plan.layout.lengths)
            ones = torch.ones((batch,), dtype=leaf.value.dtype)
            values[leaf.name] = ones if lengths is None else lengths.to(leaf.value.dtype)
        return values

    def _output(self, value: Tensor, axes: Any, batch: Any) -> Tensor:
        public: Tensor = axes.to_public(value, batch)
        one_step = self._plan.scan and (axes.time is not None or axes.merged is not None)
        return public.squeeze(1) if one_step else public

    @staticmethod
    def _guard(new: Tensor, old: Tensor, lengths: Tensor | None) -> Tensor:
        """Onnxruntime gives zeros for a row of no time steps: it keeps its state instead."""
        return new if lengths is None else torch.where((lengths > 0).unsqueeze(1), new, old)


def run_traced(plan: Plan, values: Mapping[str, Tensor]) -> Any:
    """The user's forward; what it raises becomes a CaptureError here, before torch.export prints the graph so far."""
    paths = ModulePaths(plan.module)
    args, kwargs = plan.signature.call(values, traced=True)
    try:
        with paths.watch(), _unchecked(plan.module):
            return plan.module(*args, **kwargs)
    except CaptureError:
        raise
    except Exception as error:
        raise _refusal(error, paths.current) from error


@contextmanager
def _unchecked(module: nn.Module) -> Iterator[None]:
    """No size checks in torch's recurrent modules: with packed input they turn the batch into a number.

    The observed run has passed them.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    for part in parts:
        part.__dict__["check_forward_args"] = lambda *_: None
    try:
        yield
    finally:
        for part in parts:
            del part.__dict__["check_forward_args"]


def timed_inputs(plan: Plan) -> list[bool]:
    """Which of the step graph's inputs are `[batch, time, *row]`."""
    return [not plan.scan and plan.layout.axes[name].time is not None for name in plan.inputs]


def trace(plan: Plan, graph: StepGraph) -> ExportedProgram:
    """Exports the step graph with batch, and in sequence form time, dynamic.

    Raises:
        CaptureError: torch.export cannot follow forward().
    """
    args, dynamic = trace_arguments(plan)
    return export_graph(graph, args, dynamic)


def trace_arguments(plan: Plan) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of StepGraph.forward to trace with, and their dynamic shapes."""
    time = 1 if plan.scan else plan.layout.time
    inputs, input_dims = [], []
    for name in plan.inputs:
        leaf = next(leaf for leaf in plan.signature.leaves if leaf.name == name)
        axes = plan.layout.axes[name]
        row = axes.row(tuple(leaf.value.shape))
        timed = axes.time is not None and not plan.scan
        public = leaf.value.new_zeros((BATCH, time, *row) if timed else (BATCH, *row))
        inputs.append(public)
        input_dims.append({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if timed else {0: Dim.DYNAMIC})
    states = tuple(state.initial.expand(BATCH, -1).clone() for state in plan.layer_states)
    customs = tuple(state.initial.expand(BATCH, *state.initial.shape).clone() for state in plan.custom_states)
    lengths = None if plan.scan else torch.full((BATCH,), time, dtype=torch.int32)
    rows = {0: Dim.DYNAMIC}
    dynamic = (
        tuple(input_dims),
        None if lengths is None else rows,
        tuple(rows for _ in states),
        tuple(rows for _ in customs),
    )
    return (tuple(inputs), lengths, states, customs), dynamic


def same_sizes(inputs: Sequence[Tensor], timed: Sequence[bool], others: Sequence[Tensor | None]) -> None:
    """Tells the trace that all tensors have the same rows, and all sequences the same time steps."""
    tensors = [*inputs, *(item for item in others if item is not None)]
    for item in tensors[1:]:
        torch._check(item.shape[0] == tensors[0].shape[0])  # type: ignore[no-untyped-call]
    sequences = [item for item, has_time in zip(inputs, timed, strict=True) if has_time]
    for item in sequences[1:]:
        torch._check(item.shape[1] == sequences[0].shape[1])  # type: ignore[no-untyped-call]


def export_graph(graph: nn.Module, args: tuple[Any, ...], dynamic: Any) -> ExportedProgram:
    """torch.export without its noise; its refusals become CaptureErrors."""
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph, args, dynamic_shapes=dynamic, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise _refusal(error, "") from error


def _refusal(error: Exception, path: str) -> CaptureError:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    kind = type(error).__name__
    if "data-dependent" in text or "DataDependent" in kind or "item()" in text:
        return CaptureError(
            f"its Python control flow depends on the values of tensors, which torch.export cannot follow ({first})",
            path=path,
            advice="Replace the branch or loop by tensor operations such as torch.where",
        )
    if "specialized" in text:
        return CaptureError(
            f"forward() works for one number of rows or time steps alone ({first})",
            path=path,
            advice="Do not reshape by a fixed number of rows or time steps, and write x.shape[0] for len(x)",
        )
    return CaptureError(f"torch.export cannot follow forward(): {kind}: {first}", path=path)
