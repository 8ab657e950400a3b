"""The trace's stand-in for torch's recurrent functions: every call gets its state from outside and hands it back.

Call k of the trace is call k of the observed run. Packed sequences never exist here: the step graph's rows are padded
and its operators know the lengths, so packing is a reshape, sorting by length does nothing, and padding undoes the
reshape.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from conveyor_export.capture.calls import LayerStates, RecurrentCall, is_recurrent, parse_call, result_of
from conveyor_export.capture.errors import CaptureError

Key = tuple[int, int, str]
# Runs layer `layer` of call `call` on `[time, batch, input]`; returns output and new state.
RunLayer = Callable[[int, int, Tensor, LayerStates], tuple[Tensor, LayerStates]]

_SAME = {"cpu", "to", "long", "int", "clone", "contiguous", "detach", "flatten"}


class Lift(TorchFunctionMode):
    """Replaces recurrent calls and packing while it is active.

    Args:
        calls: what the observed run called.
        states: `[batch, size]` by call, layer and role; a call without states keeps its own.
        run_layer: computes a layer.
        lengths: the tensor that the module is given as lengths, if any.

    Attributes:
        new: new states by call, layer and role, once the module has run.
        begun: initial states that each call was given by the module itself.
    """

    def __init__(
        self,
        calls: Sequence[RecurrentCall],
        states: Mapping[Key, Tensor],
        run_layer: RunLayer,
        lengths: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._calls = calls
        self._states = states
        self._run_layer = run_layer
        self._count = 0
        self.new: dict[Key, Tensor] = {}
        self.begun: dict[Key, Tensor] = {}
        self._packing = _Packing(lengths)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if is_recurrent(func):
            return self._call(parse_call(func, args, kwargs))
        handled, result = self._packing.handle(func, args, kwargs)
        return result if handled else func(*args, **kwargs)

    def _call(self, call: RecurrentCall) -> Any:
        index = self._count
        self._count += 1
        if index >= len(self._calls) or self._calls[index].kind != call.kind:
            raise CaptureError(
                "it calls its recurrent layers in another order or number than in the observed run",
                advice="forward() must make the same recurrent calls for every input",
            )
        batch, time = call.batch, call.time
        if call.packed:
            time, batch = self._packing.sizes(call.batch_sizes)
            x = call.input.reshape(time, batch, *call.input.shape[1:])
        elif call.cell:
            x = call.input.unsqueeze(0)
        else:
            x = call.input.transpose(0, 1) if call.batch_first else call.input
        finals: list[LayerStates] = []
        for layer, begun in enumerate(call.initial):
            self.begun |= {(index, layer, role): begun[role] for role in call.roles}
            state = {role: self._states.get((index, layer, role), begun[role]) for role in call.roles}
            x, new = self._run_layer(index, layer, x, state)
            self.new |= {(index, layer, role): new[role] for role in call.roles}
            finals.append(new)
        if call.packed:
            x = x.flatten(0, 1)
        elif call.batch_first:
            x = x.transpose(0, 1)
        return result_of(call, x, finals)


class _Packing:
    """Packing, sorting and padding by length, undone."""

    def __init__(self, lengths: Tensor | None) -> None:
        # By id; the values keep the tensors alive, so that no id is used twice.
        self._lengths: dict[int, Tensor] = {} if lengths is None else {id(lengths): lengths}
        self._orders: dict[int, Tensor] = {}
        self._sizes: dict[int, tuple[Tensor, tuple[Any, Any]]] = {}
        self._last_lengths: Tensor | None = lengths

    def sizes(self, batch_sizes: Tensor | None) -> tuple[Any, Any]:
        """Time and batch of a packed call."""
        return self._sizes[id(batch_sizes)][1]

    def handle(  # noqa: PLR0911  one return for each function that packing goes through
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bool, Any]:
        """(True, result) where this call is about packing."""
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return True, self._pack(*args)
        if name == "_pad_packed_sequence":
            return True, self._pad(*args)
        if not args or not isinstance(args[0], Tensor):
            return False, None
        first = args[0]
        if name in {"sort", "argsort"} and (id(first) in self._lengths or id(first) in self._orders):
            order = self._mark_order(torch.arange(first.shape[0]))
            return True, (order if name == "argsort" else (first, order))
        if name == "tolist" and id(first) in self._lengths:
            return True, first
        if name == "scatter_" and len(args) > 2 and id(args[2]) in self._orders:
            self._mark_order(first)
            return True, first
        if name == "index_select" and id(args[-1]) in self._orders:
            return True, first
        if name == "__getitem__" and id(args[1]) in self._orders:
            return True, first
        if name == "__getitem__" and id(first) in self._sizes and args[1] == 0:
            return True, self._sizes[id(first)][1][1]
        if name in _SAME:
            return self._same(func, args, kwargs)
        return False, None

    def _same(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Keeps the mark of a tensor that is only converted."""
        for marks in (self._lengths, self._orders):
            if id(args[0]) in marks:
                result = func(*args, **kwargs)
                marks[id(result)] = result
                return True, result
        return False, None

    def _mark_order(self, order: Tensor) -> Tensor:
        self._orders[id(order)] = order
        return order

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        steps = x.transpose(0, 1) if batch_first else x
        time, batch = steps.shape[0], steps.shape[1]
        batch_sizes = torch.zeros((time,), dtype=torch.int64)
        self._sizes[id(batch_sizes)] = (batch_sizes, (time, batch))
        self._last_lengths = lengths
        return steps.flatten(0, 1), batch_sizes

    def _pad(
        self, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: Any
    ) -> tuple[Tensor, Tensor | None]:
        del padding_value, total_length
        steps = data.reshape(*self.sizes(batch_sizes), *data.shape[1:])
        return (steps.transpose(0, 1) if batch_first else steps), self._last_lengths
