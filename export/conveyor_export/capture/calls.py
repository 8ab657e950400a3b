"""One recurrent call as PyTorch makes it, whatever its signature: kind, layers, weights, states.

Everything that knows the argument orders of torch's `lstm`, `gru`, `rnn_*` and `*_cell` functions is here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from conveyor_proto.v1 import spec_pb2
from torch import Tensor

HIDDEN = "hidden"
CELL = "cell"

_KINDS = {
    "rnn_tanh": spec_pb2.LAYER_KIND_RNN_TANH,
    "rnn_relu": spec_pb2.LAYER_KIND_RNN_RELU,
    "lstm": spec_pb2.LAYER_KIND_LSTM,
    "gru": spec_pb2.LAYER_KIND_GRU,
}
# The function over a whole sequence, by kind.
RECURRENT: dict[spec_pb2.LayerKind.ValueType, Callable[..., Any]] = {
    kind: getattr(torch, name) for name, kind in _KINDS.items()
}
_FUNCTIONS = {getattr(torch, name + suffix) for name in _KINDS for suffix in ("", "_cell")}
_SEQUENCE = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer in torch's layout; `w_hr` projects an LSTM's hidden state."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, absent ones as None."""
        return (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)


# Per layer: state tensor `[batch, size]` by role.
LayerStates = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RecurrentCall:
    """One call of a recurrent function.

    Attributes:
        kind: LayerKind.
        cell: a `*_cell` function, one time step of `[batch, features]`.
        packed: the input is the data of a PackedSequence.
        input: as given to the function.
        batch: rows. time: steps (1 for a cell).
        weights: per layer, forward direction only.
        initial: per layer, `[batch, size]` by role.
    """

    kind: spec_pb2.LayerKind.ValueType
    cell: bool
    packed: bool
    batch_first: bool
    bidirectional: bool
    dropout: float
    input: Tensor
    batch_sizes: Tensor | None
    batch: Any
    time: Any
    weights: Sequence[LayerWeights]
    initial: Sequence[LayerStates]
    path: str = ""
    final: Sequence[LayerStates] = field(default_factory=tuple)

    @property
    def roles(self) -> tuple[str, ...]:
        """States of each layer, in the order of torch's tuples."""
        return (HIDDEN, CELL) if self.kind == spec_pb2.LAYER_KIND_LSTM else (HIDDEN,)


def is_recurrent(func: Callable[..., Any]) -> bool:
    """True for the torch functions that this file knows."""
    return func in _FUNCTIONS


def parse_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RecurrentCall:
    """Reads the arguments of a recurrent function; works on fake and on symbolic tensors too."""
    name = func.__name__
    kind = _KINDS[name.removesuffix("_cell")]
    if name.endswith("_cell"):
        return _parse_cell(kind, dict(zip(_CELL, args, strict=False)) | dict(kwargs))
    packed = "batch_sizes" in kwargs or (len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 1)
    return _parse_sequence(kind, dict(zip(_PACKED if packed else _SEQUENCE, args, strict=False)) | dict(kwargs), packed)


def _parse_cell(kind: spec_pb2.LayerKind.ValueType, given: Mapping[str, Any]) -> RecurrentCall:
    x = given["input"]
    weights = LayerWeights(given["w_ih"], given["w_hh"], given.get("b_ih"), given.get("b_hh"))
    hx = given["hx"] if kind == spec_pb2.LAYER_KIND_LSTM else (given["hx"],)
    return RecurrentCall(
        kind=kind,
        cell=True,
        packed=False,
        batch_first=True,
        bidirectional=False,
        dropout=0.0,
        input=x,
        batch_sizes=None,
        batch=x.shape[0],
        time=1,
        weights=(weights,),
        initial=(dict(zip((HIDDEN, CELL), hx, strict=False)),),
    )


def _parse_sequence(kind: spec_pb2.LayerKind.ValueType, given: Mapping[str, Any], packed: bool) -> RecurrentCall:
    lstm = kind == spec_pb2.LAYER_KIND_LSTM
    stacks = tuple(given["hx"]) if lstm else (given["hx"],)
    batch_first = bool(given.get("batch_first", False))
    directions = 2 if given["bidirectional"] else 1
    layers = int(given["num_layers"])
    x = given["data"] if packed else given["input"]
    if packed:
        batch, time = stacks[0].shape[1], given["batch_sizes"].shape[0]
    else:
        batch, time = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    return RecurrentCall(
        kind=kind,
        cell=False,
        packed=packed,
        batch_first=batch_first,
        bidirectional=directions == 2,
        dropout=float(given["dropout"]) if given["train"] else 0.0,
        input=x,
        batch_sizes=given.get("batch_sizes"),
        batch=batch,
        time=time,
        weights=_layer_weights(list(given["params"]), layers, directions, bool(given["has_biases"])),
        initial=_per_layer(stacks, layers, directions),
    )


def _layer_weights(params: list[Tensor], layers: int, directions: int, biases: bool) -> tuple[LayerWeights, ...]:
    each = len(params) // (layers * directions)
    weights = []
    for layer in range(layers):
        group = params[layer * directions * each :][:each]
        b_ih, b_hh = (group[2], group[3]) if biases else (None, None)
        projected = each > (4 if biases else 2)
        weights.append(LayerWeights(group[0], group[1], b_ih, b_hh, group[-1] if projected else None))
    return tuple(weights)


def _per_layer(stacks: Sequence[Tensor], layers: int, directions: int) -> tuple[LayerStates, ...]:
    return tuple(
        dict(zip((HIDDEN, CELL), [stack[layer * directions] for stack in stacks], strict=False))
        for layer in range(layers)
    )


def finals_of(call: RecurrentCall, result: Any) -> tuple[LayerStates, ...]:
    """The new state per layer that a recurrent function's result carries."""
    if call.cell:
        new = result if isinstance(result, tuple | list) else (result,)
        return (dict(zip(call.roles, new, strict=True)),)
    return _per_layer(result[1:], len(call.weights), 2 if call.bidirectional else 1)


def result_of(call: RecurrentCall, output: Tensor, finals: Sequence[LayerStates]) -> Any:
    """The result that the recurrent function would have returned: the inverse of `finals_of`."""
    if call.cell:
        new = tuple(finals[0][role] for role in call.roles)
        return new if len(new) > 1 else new[0]
    return (output, *(torch.stack([layer[role] for layer in finals]) for role in call.roles))
