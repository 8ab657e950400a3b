"""The second trace: the walked graph once more, with contexts in place of left padding and each row's own last step.

In a rewritten graph no tensor has elements that belong to right padding: they are not computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everyone knows it by
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from conveyor_export.capture.mixing import arguments_of


@dataclass(frozen=True, slots=True)
class LookBack:
    """Left padding over time: the steps before a chunk come from a context, which is session state.

    Attributes:
        operator, path, ordinal: which call of the module it is, as observe counts them.
        axis, batch_axis: of the padded tensor. steps: context length. fill: what a fresh context holds.
        row_shape, dtype: of one session's context.
        part: which of the joined tensors is the sequence, where it is a cat.
        source: node that is padded. untrimmed: the same before `trimmed` steps were cut off its end, or empty.
    """

    operator: str
    path: str
    ordinal: int
    axis: int
    batch_axis: int
    steps: int
    fill: float
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    part: int
    source: str
    untrimmed: str = ""
    trimmed: int = 0


@dataclass(frozen=True, slots=True)
class LastStep:
    """The last element along `axis`, which has `extra` elements more than there are time steps."""

    axis: int
    batch_axis: int
    extra: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Trim:
    """A slice of a tensor whose right padding was left away: from `start`, without the last `cut` elements."""

    axis: int
    start: int
    cut: int


# By node name.
Rewrites = dict[str, LookBack | LastStep | Trim]


def contexts_of(rewrites: Rewrites) -> list[tuple[str, LookBack]]:
    """The rewrites that need a context, in the order of the graph."""
    return [(name, item) for name, item in rewrites.items() if isinstance(item, LookBack) and item.steps]


class RewrittenGraph(nn.Module):
    """A traced graph with rewrites; takes one more group of inputs, contexts, and returns the new ones last."""

    def __init__(self, graph: GraphModule, rewrites: Rewrites, same_sizes: Callable[..., None]) -> None:
        super().__init__()
        self._same_sizes = same_sizes
        self.traced = graph
        self._rewrites = rewrites

    def forward(
        self,
        inputs: Sequence[Tensor],
        lengths: Tensor,
        states: Sequence[Tensor],
        customs: Sequence[Tensor],
        contexts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """What the graph returns, then the new contexts `[batch, *row]`."""
        self._same_sizes(inputs, (lengths, *states, *customs, *contexts))
        names = [name for name, _ in contexts_of(self._rewrites)]
        interpreter = _Rewriter(self.traced, self._rewrites, lengths, dict(zip(names, contexts, strict=True)))
        returned = interpreter.run(*inputs, lengths, *states, *customs, enable_io_processing=False)
        return (*returned, *(interpreter.renewed[name] for name in names))


class _Rewriter(Interpreter):
    def __init__(self, graph: GraphModule, rewrites: Rewrites, lengths: Tensor, contexts: Mapping[str, Tensor]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._rewrites = rewrites
        self._lengths = lengths.to(torch.int64)
        self._contexts = contexts
        self._by_name: dict[str, Node] = {node.name: node for node in graph.graph.nodes}
        self.renewed: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        rewrite = self._rewrites.get(n.name)
        if rewrite is None:
            return super().run_node(n)
        if isinstance(rewrite, LastStep):
            return self._last_step(self._value(arguments_of(n)["self"]), rewrite)
        if isinstance(rewrite, Trim):
            x: Tensor = self._value(arguments_of(n)["self"])
            return x.narrow(rewrite.axis, rewrite.start, x.shape[rewrite.axis] - rewrite.start - rewrite.cut)
        return self._look_back(n, rewrite)

    def _value(self, item: Any) -> Any:
        """An argument with nodes replaced by their values."""
        return torch.fx.node.map_arg(item, self.env.__getitem__)

    def _last_step(self, x: Tensor, rewrite: LastStep) -> Tensor:
        """Each row's element at its own length; any element for a row of no time steps."""
        at = (self._lengths - 1).clamp(min=0) + rewrite.extra
        shape = [1] * x.dim()
        shape[rewrite.batch_axis] = -1
        target = list(x.shape)
        target[rewrite.axis] = 1
        picked = torch.gather(x, rewrite.axis, at.reshape(shape).expand(target))
        return picked if rewrite.keep else picked.squeeze(rewrite.axis)

    def _look_back(self, node: Node, rewrite: LookBack) -> Tensor:
        given = {name: self._value(value) for name, value in arguments_of(node).items()}
        x: Tensor = self.env[self._node(rewrite.source)]
        if rewrite.steps:
            x = self._extended(node, rewrite, x)
        if "tensors" in given:
            return x
        if "weight" in given:
            return _convolve(x, given, rewrite.axis)
        pads = list(given["pad"])
        index = 2 * (x.dim() - 1 - rewrite.axis)
        pads[index : index + 2] = [0, 0]
        fill = rewrite.fill if x.is_floating_point() else int(rewrite.fill)
        return F.pad(x, pads, value=fill) if any(pads) else x

    def _extended(self, node: Node, rewrite: LookBack, x: Tensor) -> Tensor:
        """The context before the sequence; keeps each row's last steps as its new context."""
        context = torch.movedim(self._contexts[node.name], 0, rewrite.batch_axis)
        whole = torch.cat([context, self.env[self._node(rewrite.untrimmed)] if rewrite.untrimmed else x], rewrite.axis)
        shape = [1] * whole.dim()
        shape[rewrite.batch_axis] = -1
        steps = [1] * whole.dim()
        steps[rewrite.axis] = rewrite.steps
        at = self._lengths.reshape(shape) + torch.arange(rewrite.steps).reshape(steps)
        renewed = torch.gather(whole, rewrite.axis, at.expand(context.shape))
        self.renewed[node.name] = torch.movedim(renewed, rewrite.batch_axis, 0)
        return whole.narrow(rewrite.axis, 0, whole.shape[rewrite.axis] - rewrite.trimmed) if rewrite.trimmed else whole

    def _node(self, name: str) -> Node:
        return self._by_name[name]


def _convolve(x: Tensor, given: Mapping[str, Any], axis: int) -> Tensor:
    """The convolution without padding over time."""
    weight = given["weight"]
    spatial = weight.dim() - 2
    dilation, stride = _all(given["dilation"], spatial), _all(given["stride"], spatial)
    pads: list[int] = []
    for index in reversed(range(spatial)):
        reach = (weight.shape[index + 2] - 1) * dilation[index]
        if index + 2 == axis or given["padding"] == "valid":
            pads += [0, 0]
        elif given["padding"] == "same":
            pads += [reach // 2, reach - reach // 2]
        else:
            pads += [_all(given["padding"], spatial)[index]] * 2
    padded = F.pad(x, pads) if any(pads) else x
    function = getattr(torch, f"conv{spatial}d")
    result: Tensor = function(padded, weight, given["bias"], stride, 0, dilation, given["groups"])
    return result


def _all(values: Any, count: int) -> list[int]:
    listed = list(values) if isinstance(values, list | tuple) else [values]
    return listed if len(listed) == count else listed * count
