"""Finds the session state: which initial states no input reaches, and which arguments of forward() are state.

Dependence is observed, not guessed: the same run is made again with one input drawn anew, and the initial states of all
recurrent calls are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conveyor_export.capture.calls import RecurrentCall
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layout import BATCH, Layout, Prober
from conveyor_export.capture.observe import Observation
from conveyor_export.capture.plan import LayerState, StateArgument, name_layers
from conveyor_export.capture.signature import Leaf

Key = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Flows:
    """Where the initial states of one trace come from.

    Attributes:
        observation: the run. values: its inputs. initials: initial states `[batch, size]`.
        reached: names of the leaves that each initial state depends on.
        arguments: leaves that are nothing but states of layers.
    """

    observation: Observation
    values: Mapping[str, Tensor]
    initials: Mapping[Key, Tensor]
    reached: Mapping[Key, set[str]]
    arguments: tuple[StateArgument, ...]


def find_flows(prober: Prober, layout: Layout, time: int) -> Flows:
    """Runs one trace of `time` steps, and once more for every input drawn anew.

    Raises:
        CaptureError: a call computes what no operator of onnxruntime does.
    """
    values = prober.draw(layout, BATCH, time)
    base = prober.run(values)
    for call in base.calls:
        check_call(call)
    initials = _initials(base)
    reached = _reached(prober, layout, time, initials)
    return Flows(
        base, values, initials, reached, _arguments(prober.signature.leaves, layout, values, initials, reached)
    )


def find_states(
    prober: Prober,
    layout: Layout,
    flows: Flows,
    arguments: Sequence[StateArgument],
    *,
    custom: frozenset[str],
    root: str,
) -> tuple[tuple[LayerState, ...], frozenset[str]]:
    """Session states of the recurrent calls, and the parameters whose example rows differ.

    An initial state that comes from a custom state's leaf is no state of its own.

    Raises:
        CaptureError: an initial state depends on the user's input, or differs from row to row.
    """
    calls = flows.observation.calls
    explicit = {key: item for item in arguments for key in item.pieces}
    paths = name_layers(tuple(calls), root)
    states, ambiguous = [], set()
    for key, initial in flows.initials.items():
        own = {explicit[key].leaf} if key in explicit else set()
        _refuse_computed(calls[key[0]], flows.reached[key] - own - custom)
        if flows.reached[key] & custom:
            continue
        row = initial[0]
        if key in explicit:
            given = _example_row(prober, layout, explicit[key], key)
            if given is None:
                ambiguous.add(parameter_of(prober, explicit[key].leaf))
            else:
                row = given
        elif not all(torch.equal(other, initial[0]) for other in initial):
            raise CaptureError(
                "its initial state differs from row to row of the batch",
                path=calls[key[0]].path,
                advice="Start every sequence from the same state",
            )
        path = paths[key[0], key[1]]
        states.append(LayerState(_state_name(path, key[2]), path, *key, row.clone()))
    return tuple(states), frozenset(ambiguous)


def check_call(call: RecurrentCall) -> None:
    """Refuses what no recurrent operator of onnxruntime computes."""
    weights = [tensor for layer in call.weights for tensor in layer.tensors if tensor is not None]
    for tensor in weights:
        if tensor.dtype != torch.float32:
            raise CaptureError(
                f"its weights are {str(tensor.dtype).removeprefix('torch.')}, and onnxruntime's recurrent operators "
                "compute in float32",
                path=call.path,
                advice="Convert the module with module.float() and give float32 inputs",
            )
    if call.dropout:
        raise CaptureError(
            "it applies dropout in eval mode, so its answers are random", path=call.path, advice="Pass train=False"
        )


def check_time(calls: Sequence[RecurrentCall], time: int) -> None:
    """Refuses a call that does not run along time over the rows of the batch; its steps are the trace's matter."""
    for call in calls:
        if call.batch != BATCH:
            raise CaptureError(
                f"it is called on {call.batch} rows of {call.time} steps where the batch has {BATCH} rows of {time}: "
                "it runs along another axis than time",
                path=call.path,
                advice="Only recurrence along the input's time axis can be streamed",
            )
        if call.time == 1 < time:
            raise CaptureError(
                f"it is called on one step where the input has {time}: once per chunk, not along time",
                path=call.path,
                advice="Call recurrent layers on whole sequences, or cells once for each time step",
            )


def _initials(observation: Observation) -> dict[Key, Tensor]:
    return {
        (index, layer, role): states[role]
        for index, call in enumerate(observation.calls)
        for layer, states in enumerate(call.initial)
        for role in call.roles
    }


def _reached(prober: Prober, layout: Layout, time: int, initials: Mapping[Key, Tensor]) -> dict[Key, set[str]]:
    """Names of the leaves that each initial state depends on."""
    reached: dict[Key, set[str]] = {key: set() for key in initials}
    for leaf in prober.signature.leaves:
        if leaf.name == layout.lengths:
            continue
        try:
            other = _initials(prober.run(prober.draw(layout, BATCH, time, {leaf.name: 1})))
        except IndexError:
            # A constant integer example leaves no room: the next value was outside of the module's table.
            continue
        for key, initial in initials.items():
            if key not in other or not torch.equal(initial, other[key]):
                reached[key].add(leaf.name)
    return reached


def _arguments(
    leaves: Sequence[Leaf],
    layout: Layout,
    values: Mapping[str, Tensor],
    initials: Mapping[Key, Tensor],
    reached: Mapping[Key, set[str]],
) -> tuple[StateArgument, ...]:
    """Leaves without time all of whose rows are initial states of layers, unchanged."""
    found = []
    for leaf in leaves:
        axes = layout.axes[leaf.name]
        if axes.time is not None or axes.batch is None or leaf.name == layout.lengths:
            continue
        public = axes.to_public(values[leaf.name], BATCH)
        if public.dim() not in {2, 3}:
            continue
        stacked = public.dim() == 3
        rows = public.unbind(1) if stacked else (public,)
        candidates = [key for key in initials if leaf.name in reached[key]]
        pieces = [next((key for key in candidates if torch.equal(initials[key], row)), None) for row in rows]
        if all(piece is not None for piece in pieces):
            found.append(StateArgument(leaf.name, tuple(piece for piece in pieces if piece is not None), stacked))
    return tuple(found)


def _refuse_computed(call: RecurrentCall, leaves: set[str]) -> None:
    if leaves:
        names = ", ".join(sorted(leaves))
        raise CaptureError(
            f"its initial state is computed from the input ({names}): an encoder needs the whole input before this "
            "layer can start, so answers cannot be streamed",
            path=call.path,
            advice="Export the encoder and the decoder apart, the decoder with its state in forward's signature",
        )


def _example_row(prober: Prober, layout: Layout, argument: StateArgument, key: Key) -> Tensor | None:
    """The row that all rows of the example agree on: what a fresh session starts from."""
    leaf = next(leaf for leaf in prober.signature.leaves if leaf.name == argument.leaf)
    public = layout.axes[leaf.name].to_public(leaf.value, leaf.value.shape[layout.axes[leaf.name].batch or 0])
    rows = public[:, argument.pieces.index(key)] if argument.stacked else public
    return rows[0] if all(torch.equal(row, rows[0]) for row in rows) else None


def _state_name(layer_path: str, role: str) -> str:
    path, mark, call = layer_path.partition("#")
    return f"{path}.{role}{mark}{call}"


def parameter_of(prober: Prober, leaf_name: str) -> str:
    """The forward parameter that a leaf belongs to."""
    return next(leaf.parameter for leaf in prober.signature.leaves if leaf.name == leaf_name)
