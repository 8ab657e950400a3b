"""The plan of a step model: its session states and user outputs, decided from what the module was observed to do.

Every initial state of a recurrent call is either the same for every session (then it is session state) or an argument
of forward() (then it is the same state, passed explicitly). Anything else depends on the user's input and is refused.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from conveyor_proto.v1 import spec_pb2
from torch import Tensor, nn

from conveyor_export.capture.calls import CELL, HIDDEN, RecurrentCall
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layout import Layout
from conveyor_export.capture.outputs import OutputLeaf
from conveyor_export.capture.signature import Signature

ROLES = {HIDDEN: spec_pb2.STATE_ROLE_HIDDEN, CELL: spec_pb2.STATE_ROLE_CELL}


@dataclass(frozen=True, slots=True)
class LayerState:
    """State of one layer of one recurrent call.

    Attributes:
        name: StateSpec.name. call: index of the call in one step. layer: index in the call. role: HIDDEN or CELL.
        initial: a fresh session's row `[size]`.
    """

    name: str
    layer_path: str
    call: int
    layer: int
    role: str
    initial: Tensor

    @property
    def key(self) -> tuple[int, int, str]:
        """Call, layer and role."""
        return (self.call, self.layer, self.role)


@dataclass(frozen=True, slots=True)
class CustomState:
    """State of the module's own making: an argument of forward() that is returned renewed.

    Attributes:
        leaf: the argument's leaf. output: position of its new value among the returned tensors.
        initial: a fresh session's row, without the batch axis.
    """

    name: str
    leaf: str
    output: int
    initial: Tensor


@dataclass(frozen=True, slots=True)
class StateArgument:
    """An argument of forward() that is nothing but states of layers.

    Attributes:
        leaf: the argument's leaf. pieces: keys of the layer states in it, in order. stacked: they lie along an axis
            of their own, the first after batch.
    """

    leaf: str
    pieces: tuple[tuple[int, int, str], ...]
    stacked: bool


@dataclass(frozen=True, slots=True)
class UserOutput:
    """An output that the user sees, by name."""

    name: str
    leaf: OutputLeaf


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that later stages need to know about the module.

    Attributes:
        calls: recurrent calls of one trace, in order. scan: the step graph runs at one time step, inside a Scan.
        carried: the module's loop changes states between its calls, so that a step's new states are those that the next
            step's calls start from.
        inputs: leaf names of the user's inputs, in order.
    """

    module: nn.Module
    name: str
    signature: Signature
    layout: Layout
    calls: tuple[RecurrentCall, ...]
    scan: bool
    inputs: tuple[str, ...]
    input_names: dict[str, str]
    outputs: tuple[UserOutput, ...]
    layer_states: tuple[LayerState, ...]
    custom_states: tuple[CustomState, ...] = ()
    arguments: tuple[StateArgument, ...] = ()
    layer_paths: dict[tuple[int, int], str] = field(default_factory=dict)
    carried: bool = False

    def initial_arguments(self, batch: int) -> dict[str, Tensor]:
        """Explicit state arguments of fresh sessions, in the module's own order of axes."""
        rows = {state.key: state.initial for state in self.layer_states}
        values = {
            item.leaf: self.assemble(item, {key: rows[key].expand(batch, -1) for key in item.pieces})
            for item in self.arguments
        }
        for state in self.custom_states:
            axes = self.layout.axes[state.leaf]
            values[state.leaf] = axes.to_module(state.initial.expand(batch, *state.initial.shape)).clone()
        return values

    def assemble(self, argument: StateArgument, states: dict[tuple[int, int, str], Tensor]) -> Tensor:
        """The argument's tensor from layer states `[batch, size]`."""
        pieces = [states[key] for key in argument.pieces]
        public = torch.stack(pieces, dim=1) if argument.stacked else pieces[0]
        return self.layout.axes[argument.leaf].to_module(public)


def name_layers(calls: tuple[RecurrentCall, ...], root: str) -> dict[tuple[int, int], str]:
    """LayerSpec.path by call and layer: `encoder.lstm.0`, and `encoder.lstm.0#2` for a second call of the module."""
    seen: Counter[str] = Counter()
    names = {}
    for index, call in enumerate(calls):
        path = call.path or root
        seen[path] += 1
        suffix = f"#{seen[path]}" if seen[path] > 1 else ""
        for layer in range(len(call.weights)):
            names[index, layer] = f"{path}.{layer}{suffix}"
    return names


def no_state(plan: Plan) -> CaptureError:
    """The refusal of a module that remembers nothing."""
    omitted = ", ".join(map(repr, plan.signature.omitted))
    hint = f" (also {omitted}, which the example leaves out)" if omitted else ""
    return CaptureError(
        "it has no recurrent state: no RNN, LSTM or GRU call, no cell, no causal convolution, no state in forward()",
        advice="A module without memory needs no sessions. If it computes its recurrence by hand, pass the state "
        f"through forward's signature, give it in the example inputs{hint} and return the new one",
    )
