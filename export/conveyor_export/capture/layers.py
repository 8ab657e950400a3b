"""One recurrent layer as one ONNX operator: weights in ONNX's gate order, and the call that export writes as a node."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from conveyor_proto.v1 import spec_pb2
from torch import Tensor

from conveyor_export.capture.calls import CELL, HIDDEN, RECURRENT, LayerStates, LayerWeights, RecurrentCall

# Opset of the emitted operators; LSTM, GRU and RNN are unchanged since 14.
OPSET = 20
# Metadata key that carries a layer's path from the trace to the ONNX node, where it becomes the node's name.
LAYER_KEY = "conveyor.layer"
# A projected LSTM has no ONNX operator: this one is written, and replaced by a Scan afterwards.
PROJECTED = "conveyor::ProjectedLSTM"

# Torch's gate of each ONNX gate: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h.
_GATES = {
    spec_pb2.LAYER_KIND_LSTM: (0, 3, 1, 2),
    spec_pb2.LAYER_KIND_GRU: (1, 0, 2),
    spec_pb2.LAYER_KIND_RNN_TANH: (0,),
    spec_pb2.LAYER_KIND_RNN_RELU: (0,),
}


@dataclass(frozen=True, slots=True)
class OnnxLayer:
    """A layer's constants in ONNX's gate order.

    Attributes:
        w: `[1, gates * hidden, input]`.
        r: `[1, gates * hidden, hidden]`, or `[1, gates * hidden, projected]`.
        b: `[1, 2 * gates * hidden]`, or None without biases.
        p: `[projected, hidden]`, or None.
    """

    path: str
    kind: spec_pb2.LayerKind.ValueType
    hidden_size: int
    w: Tensor
    r: Tensor
    b: Tensor | None
    p: Tensor | None

    def spec(self, node: str) -> spec_pb2.LayerSpec:
        """LayerSpec, computed by `node`; empty when it is inside a Scan."""
        return spec_pb2.LayerSpec(
            path=self.path,
            kind=self.kind,
            input_size=self.w.shape[2],
            hidden_size=self.hidden_size,
            proj_size=0 if self.p is None else self.p.shape[0],
            node=node,
        )


def to_onnx(kind: spec_pb2.LayerKind.ValueType, path: str, weights: LayerWeights) -> OnnxLayer:
    """Reorders the gates of a layer's weights."""
    gates = _GATES[kind]

    def reorder(tensor: Tensor) -> Tensor:
        blocks = tensor.detach().chunk(len(gates))
        return torch.cat([blocks[gate] for gate in gates]).unsqueeze(0).clone()

    b = None
    if weights.b_ih is not None and weights.b_hh is not None:
        b = torch.cat([reorder(weights.b_ih), reorder(weights.b_hh)], dim=1)
    p = None if weights.w_hr is None else weights.w_hr.detach().clone()
    hidden_size = weights.w_hh.shape[0] // len(gates)
    return OnnxLayer(path, kind, hidden_size, reorder(weights.w_ih), reorder(weights.w_hh), b, p)


def run_layer(
    layer: OnnxLayer, constants: Mapping[str, Tensor], x: Tensor, state: Mapping[str, Tensor], lengths: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Writes one layer into the graph being traced.

    Args:
        layer: the layer.
        constants: `w`, `r`, `b`, `p` as the traced module holds them.
        x: `[time, batch, input]`.
        state: `[batch, size]` by role.
        lengths: `[batch]` int32, or None where all rows have all time steps.

    Returns:
        The output `[time, batch, size]` and the new state by role.
    """
    lstm = layer.kind == spec_pb2.LAYER_KIND_LSTM
    roles = (HIDDEN, CELL) if lstm else (HIDDEN,)
    inputs: list[Tensor | None] = [x, constants["w"], constants["r"], constants.get("b"), lengths]
    inputs += [state[role].unsqueeze(0) for role in roles]
    operator, attributes = _operator(layer)
    time, batch = x.shape[0], x.shape[1]
    sizes = [state[role].shape[1] for role in roles]
    if layer.p is not None:
        inputs.append(constants["p"])
    y, *new = torch.onnx.ops.symbolic_multi_out(
        operator,
        inputs,
        attributes,
        dtypes=[x.dtype] * (1 + len(roles)),
        shapes=[[time, 1, batch, sizes[0]], *([1, batch, size] for size in sizes)],
        version=OPSET if layer.p is None else 1,
        metadata_props={LAYER_KEY: layer.path},
    )
    return y.squeeze(1), {role: value.squeeze(0) for role, value in zip(roles, new, strict=True)}


def run_torch(call: RecurrentCall, layer: int, x: Tensor, state: LayerStates) -> tuple[Tensor, LayerStates]:
    """What `run_layer` computes, by torch's own function on the observed weights."""
    weights = call.weights[layer]
    params = [tensor for tensor in weights.tensors if tensor is not None]
    stacks = tuple(state[role].unsqueeze(0) for role in call.roles)
    y, *new = RECURRENT[call.kind](
        x, stacks if len(stacks) > 1 else stacks[0], params, weights.b_ih is not None, 1, 0.0, False, False, False
    )
    return y, {role: value.squeeze(0) for role, value in zip(call.roles, new, strict=True)}


def _operator(layer: OnnxLayer) -> tuple[str, dict[str, Any]]:
    """ONNX operator and attributes. Never `clip`: it pushes the operator off CUDA."""
    attributes: dict[str, Any] = {"hidden_size": layer.hidden_size}
    if layer.p is not None:
        return PROJECTED, attributes
    if layer.kind == spec_pb2.LAYER_KIND_LSTM:
        return "::LSTM", attributes
    if layer.kind == spec_pb2.LAYER_KIND_GRU:
        return "::GRU", attributes | {"linear_before_reset": 1}
    activation = "Tanh" if layer.kind == spec_pb2.LAYER_KIND_RNN_TANH else "Relu"
    return "::RNN", attributes | {"activations": [activation]}
