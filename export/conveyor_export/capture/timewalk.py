"""Walks the traced graph and follows the time axis: refuses what needs later steps, and finds what must be rewritten.

The walk reads the graph only. It returns the nodes that the step graph computes otherwise: looking back over time needs
a context, and "the last step" is each row's own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule, Node

from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.facts import Fact, TimeSymbol, path_of
from conveyor_export.capture.mixing import REDUCTIONS, arguments_of, mixing_reason, operator_of
from conveyor_export.capture.rewrite import LastStep, LookBack, Rewrites, Trim

_FILLS = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson", "exponential")
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_ARITHMETIC = {"add", "sub", "mul", "div", "pow", "rsub", "remainder", "floor_divide"}
_END = 2**62
_AHEAD = "so an answer would need later steps"


class TimeWalk:
    """One walk over one traced graph.

    Args:
        graph: the trace, time dynamic.
        time: T and the batch. lengths: name of the placeholder of lengths. outputs: how many outputs are the user's.
    """

    def __init__(self, graph: GraphModule, time: TimeSymbol, lengths: str, outputs: Sequence[str]) -> None:
        self._graph = graph
        self._time = time
        self._lengths = lengths
        self._outputs = outputs
        self._facts: dict[Node, Fact] = {}
        self._ordinals: Counter[tuple[str, str]] = Counter()
        self._rewrites: Rewrites = {}

    def run(self) -> Rewrites:
        """Rewrites by node name.

        Raises:
            CaptureError: a node needs steps that are not there yet.
        """
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                fact = Fact(axes=self._axes(node), lengths=node.name == self._lengths)
                self._facts[node] = fact
            elif node.op == "call_function":
                self._facts[node] = self._visit(node)
            elif node.op == "output":
                self._check_outputs(node)
        return self._rewrites

    def _visit(self, node: Node) -> Fact:
        operator = operator_of(node)
        handler = _HANDLERS.get(operator)
        axes = {item: self._facts[item].axes for item in [*node.all_input_nodes] if item in self._facts}
        ranks = {item: self._rank(item) for item in [node, *node.all_input_nodes]}
        reason = mixing_reason(node, axes | {node: self._axes(node)}, ranks)
        if reason:
            self._refuse(node, reason)
        if node.users and (operator.startswith(_RANDOM) or self._drops_out(node, operator)):
            self._refuse(node, "it draws random numbers, so its answers are not repeatable")
        if operator == "squeeze" and "dim" not in arguments_of(node) and self._rank(node.args[0]) > 1:
            self._refuse(node, "it squeezes all axes of size 1, which takes the batch away where there is one row")
        key = (operator, path_of(node))
        fact = handler(self, node) if handler else None
        self._ordinals[key] += 1
        return fact if fact is not None else self._plain(node, operator)

    @staticmethod
    def _drops_out(node: Node, operator: str) -> bool:
        return "dropout" in operator and bool(arguments_of(node).get("train"))

    # ------------------------------------------------------------ operators without a rule of their own

    def _plain(self, node: Node, operator: str) -> Fact:
        """An operator that works on each time step alone."""
        axes = self._axes(node)
        inputs = [self._facts[item] for item in node.all_input_nodes if item in self._facts]
        timed = [fact for fact in inputs if fact.axes]
        last = any(fact.last for fact in inputs)
        lengths = any(fact.lengths for fact in inputs)
        position = next((fact.position for fact in inputs if fact.position is not None), None)
        if not self._is_tensor(node):
            return Fact(last=last, lengths=lengths, position=position)
        if len(axes) > 1:
            self._refuse(node, "it compares every time step with every other (attention over time)")
        if timed and not axes:
            self._refuse_lost(node, operator)
        if axes and last:
            self._refuse(node, f"it uses the value of the last time step at every step, {_AHEAD}")
        if operator in _COMPARISONS and lengths:
            position = None
        if axes and not timed:
            return self._made(node, operator, axes, position)
        if not axes:
            return Fact(last=last, position=position, lengths=lengths, fill=_fill(node, operator))
        self._check_scalars(node, operator)
        extra = self._extra(node, axes)
        if len({(fact.extra, fact.excess) for fact in timed}) > 1 or any(fact.extra != extra for fact in timed):
            if any(fact.extra or fact.excess or fact.shift for fact in timed):
                self._refuse(node, "it joins or reshapes tensors whose time axes are padded differently")
        shift = max((fact.shift for fact in timed), default=0)
        return Fact(axes, extra, shift, last, position, lengths)

    def _made(self, node: Node, operator: str, axes: tuple[int, ...], position: Node | None) -> Fact:
        """A time axis out of nothing: constant along time, counted, or drawn at random."""
        constant = operator in {*_FILLS, "full", "new_full", "full_like", "expand", "repeat", "expand_as", "empty_like"}
        return Fact(axes, self._extra(node, axes), position=position if constant else node, fill=_fill(node, operator))

    def _check_scalars(self, node: Node, operator: str) -> None:
        if operator in _ARITHMETIC and any(self._time.depends(item.meta.get("val")) for item in node.all_input_nodes):
            self._refuse(node, "it computes with the number of time steps, which differs from chunk to chunk")

    def _refuse_lost(self, node: Node, operator: str) -> None:
        if operator in REDUCTIONS:
            self._refuse(node, f"it takes the {REDUCTIONS[operator]} over time, which needs the whole sequence")
        if operator in {"view", "reshape", "flatten", "_unsafe_view"}:
            self._refuse(node, "it reshapes the time axis away, which needs all time steps at once")
        self._refuse(node, f"its operator {operator} takes the time axis away, which needs the whole sequence")

    # ------------------------------------------------------------ operators with a rule

    def _getitem(self, node: Node) -> Fact:
        source = node.args[0]
        assert isinstance(source, Node)
        fact = self._facts.get(source, Fact())
        if operator_of(source) == "_symbolic_multi_out" and node.args[1] != 0:
            return Fact(last=True)
        axes = self._axes(node)
        return replace(fact, axes=axes, extra=self._extra(node, axes))

    def _recurrent(self, node: Node) -> Fact:
        x = node.args[0][0]  # type: ignore[index]
        assert isinstance(x, Node)
        fact = self._facts.get(x, Fact())
        if not fact.axes:
            self._refuse(node, "it runs along another axis than time")
        if fact.axes != (0,) or not fact.aligned:
            self._refuse(
                node, "its input is padded, cut or shifted over time, so that its steps are not those of the input"
            )
        self._refuse_position(fact)
        return Fact((0,), 0, fact.shift)

    def _select(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        source, axis = given["self"], given["dim"]
        fact = self._facts.get(source, Fact())
        axis %= self._rank(source)
        if axis not in fact.axes:
            return None
        if self._offset(given["index"], fact) != -1:
            self._refuse(node, f"it reads time step {given['index']} of the sequence, which is not known as time goes on")
        return self._last(node, fact, axis, keep=False)

    def _slice(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        source = given["self"]
        fact = self._facts.get(source, Fact())
        axis = (given["dim"] or 0) % self._rank(source)
        if axis not in fact.axes:
            return None
        if given["step"] != 1:
            self._refuse(node, "it takes every n-th time step, so that answers have another pace than inputs")
        start, end = given["start"] or 0, given["end"]
        if start == -1 or (start != 0 and self._offset(start, fact) == -1):
            return self._last(node, fact, axis, keep=True)
        if not isinstance(start, int) or start < 0:
            self._refuse(node, "it reads the last steps of the sequence, of which a chunk may have fewer")
        if fact.extra is None:
            self._refuse(node, "it cuts an axis in which time is merged with another")
        cut = 0 if end is None or (isinstance(end, int) and end >= _END) else self._offset(end, fact)
        if cut is None or (isinstance(end, int) and 0 <= end < _END):
            self._refuse(node, "it keeps a fixed number of time steps from the beginning of the sequence")
        return self._trim(node, fact, axis, start, min(cut or 0, 0))

    def _trim(self, node: Node, fact: Fact, axis: int, start: int, cut: int) -> Fact:
        if fact.shift + start > 0:
            self._refuse(node, f"it drops the first {start} time steps, so that answers run ahead of inputs")
        source = arguments_of(node)["self"]
        extra = (fact.extra or 0) - start + cut
        made = replace(fact, extra=extra, shift=fact.shift + start, untrimmed=None)
        if start == 0 and cut < 0 and not fact.excess:
            made = replace(made, untrimmed=fact.untrimmed or source)
        if fact.excess or made.excess:
            kept = (fact.extra or 0) - fact.excess - start - (extra - made.excess)
            self._rewrites[node.name] = Trim(axis, start, kept)
        return made

    def _last(self, node: Node, fact: Fact, axis: int, *, keep: bool) -> Fact:
        if fact.extra is None or fact.extra < 0 or fact.shift > 0 or fact.excess:
            self._refuse(node, "it takes the last element of a time axis that is padded, cut or merged with another")
        self._rewrites[node.name] = LastStep(axis, self._batch_axis(node, arguments_of(node)["self"]), fact.extra or 0, keep)
        return Fact(last=True, position=fact.position)

    def _index(self, node: Node) -> Fact | None:
        """Indexing by tensors: the last step by lengths, or a mix of steps."""
        given = arguments_of(node)
        source = given["self"]
        fact = self._facts.get(source, Fact())
        if not fact.axes:
            return None
        operator = operator_of(node)
        indices = given["indices"] if operator == "index" else [given["index"]]
        if operator == "index":
            touched = any(position in fact.axes for position, item in enumerate(indices) if item is not None)
        else:
            touched = given["dim"] % self._rank(source) in fact.axes
        if not touched:
            return None
        if not any(isinstance(item, Node) and self._facts.get(item, Fact()).lengths for item in indices):
            self._refuse(node, "it picks time steps by index, which may lie in the future or in an earlier chunk")
        return Fact(self._axes(node), None, last=True)

    def _split(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        source = given["self"]
        if given["dim"] % self._rank(source) in self._facts.get(source, Fact()).axes:
            self._refuse(node, "it splits the sequence along time into a fixed number of parts")
        return None

    def _pad(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        source, pads = given["self"], list(given["pad"])
        fact = self._facts.get(source, Fact())
        rank = self._rank(source)
        sides = {rank - 1 - index // 2: (pads[index], pads[index + 1]) for index in range(0, len(pads), 2)}
        axis = next((axis for axis in fact.axes if sides.get(axis, (0, 0)) != (0, 0)), None)
        if axis is None:
            return None
        left, right = sides[axis]
        if given.get("mode", "constant") != "constant":
            self._refuse(node, f"it pads time with {given['mode']} values, which repeat steps of the sequence")
        if not isinstance(left, int) or not isinstance(right, int) or left < 0:
            self._refuse(node, "it cuts or pads the beginning of the sequence by an amount that is not fixed")
        return self._look_back(node, source, axis, left, right, float(given.get("value") or 0.0))

    def _cat(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        parts = given["tensors"]
        axis = given["dim"] % self._rank(node)
        timed = [index for index, item in enumerate(parts) if axis in self._facts.get(item, Fact()).axes]
        if not timed:
            return None
        if len(timed) > 1:
            self._refuse(node, "it joins sequences one after the other along time")
        sizes, fills = [], []
        for index, item in enumerate(parts):
            if index != timed[0]:
                sizes.append(item.meta["val"].shape[axis])
                fills.append(self._facts.get(item, Fact()).fill)
        if any(fill is None or fill != fills[0] for fill in fills):
            self._refuse(
                node, "it joins other values to the sequence along time; only constant padding can be streamed"
            )
        before, after = sum(sizes[: timed[0]]), sum(sizes[timed[0] :])
        return self._look_back(node, parts[timed[0]], axis, before, after, fills[0] if fills else 0.0)

    def _convolution(self, node: Node) -> Fact | None:
        given = arguments_of(node)
        source, weight = given["input"], given["weight"]
        fact = self._facts.get(source, Fact())
        axis = next((axis for axis in fact.axes if axis >= 2), None)
        if axis is None:
            return None
        spatial = axis - 2
        kernel = weight.meta["val"].shape[axis]
        stride, dilation = _at(given["stride"], spatial), _at(given["dilation"], spatial)
        reach = (kernel - 1) * dilation
        left, right = _paddings(given["padding"], spatial, reach)
        if stride != 1:
            self._refuse(node, f"it convolves over time with stride {stride}, so that answers have another pace than inputs")
        ahead = fact.shift + reach - left
        if ahead > 0:
            self._refuse(
                node,
                f"its convolution over time is not causal: it looks {ahead} time steps ahead "
                f"(kernel {kernel}, dilation {dilation}, {left - fact.shift} steps of left padding where {reach} are needed)",
            )
        made = self._look_back(node, source, axis, left, right, 0.0)
        return replace(made, extra=(made.extra or 0) - reach, shift=made.shift + reach, untrimmed=None)

    def _look_back(self, node: Node, source: Node, axis: int, left: int, right: int, fill: float) -> Fact:
        """Padding on the left becomes the steps before; padding on the right is left away."""
        fact = self._facts[source]
        if fact.extra is None:
            self._refuse(node, "it pads an axis in which time is merged with another")
        trimmed = 0
        if left and (fact.extra or 0) < 0:
            if fact.untrimmed is None:
                self._refuse(node, "it pads a sequence that has lost steps at its beginning")
            trimmed = self._facts[fact.untrimmed].extra or 0
            trimmed -= fact.extra or 0
        if right and (fact.extra or 0) + fact.shift < 0:
            self._refuse(node, "it pads the end of a sequence that has lost its last steps")
        made = replace(fact, extra=(fact.extra or 0) + left + right, shift=fact.shift - left, fill=None, untrimmed=None)
        operator = operator_of(node)
        key = (operator, path_of(node))
        if left or right:
            batch_axis = self._batch_axis(node, source) if left else 0
            untrimmed = fact.untrimmed.name if trimmed and fact.untrimmed else ""
            shape = tuple(left if i == axis else size for i, size in enumerate(source.meta["val"].shape) if i != batch_axis)
            self._rewrites[node.name] = LookBack(
                operator, key[1], self._ordinals[key], axis, batch_axis, left, fill, shape, source.name, untrimmed, trimmed
            )
        return made

    # ------------------------------------------------------------ sinks

    def _check_outputs(self, node: Node) -> None:
        for name, item in zip(self._outputs, node.args[0], strict=False):  # type: ignore[arg-type]
            fact = self._facts.get(item, Fact()) if isinstance(item, Node) else Fact()
            if isinstance(item, Node) and fact.axes and not fact.aligned:
                self._refuse(item, f"output {name!r} is not aligned with the input's time steps, {_AHEAD}")
            self._refuse_position(fact)

    def _refuse_position(self, fact: Fact) -> None:
        if fact.position is not None:
            self._refuse(
                fact.position,
                "it uses the absolute time step (as a positional encoding does), which a chunk does not know",
            )

    # ------------------------------------------------------------ small helpers

    def _refuse(self, node: Node, reason: str) -> NoReturn:
        raise CaptureError(reason, path=path_of(node), advice="Only what depends on past time steps can be streamed")

    def _offset(self, index: Any, fact: Fact) -> int | None:
        """An index into a time axis counted from its end: -1 is the last element."""
        if isinstance(index, Node):
            extra = self._time.extra(index.meta["val"])
            return None if extra is None or fact.extra is None else extra - fact.extra
        return index if isinstance(index, int) and index < 0 else None

    def _axes(self, node: Node) -> tuple[int, ...]:
        return self._time.axes(node.meta.get("val"))

    def _extra(self, node: Node, axes: tuple[int, ...]) -> int | None:
        return self._time.extra(node.meta["val"].shape[axes[0]]) if axes else 0

    def _batch_axis(self, node: Node, source: Node) -> int:
        axis = self._time.batch_axis(source.meta["val"])
        if axis is None:
            self._refuse(node, "it reads back over time in a tensor whose rows are merged with another axis")
        return axis

    @staticmethod
    def _is_tensor(node: Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor)

    @staticmethod
    def _rank(node: Node) -> int:
        value = node.meta.get("val")
        return value.dim() if isinstance(value, torch.Tensor) else 0


def _fill(node: Node, operator: str) -> float | None:
    """The number that fills a tensor that is made by `zeros`, `ones` or `full`."""
    if operator in {"full", "new_full", "full_like"}:
        value = arguments_of(node)["fill_value"]
        return float(value) if isinstance(value, int | float) else None
    return _FILLS.get(operator)


def _at(values: Any, index: int) -> int:
    if not isinstance(values, list | tuple):
        return int(values)
    return int(values[index if len(values) > 1 else 0])


def _paddings(padding: Any, spatial: int, reach: int) -> tuple[int, int]:
    if padding == "same":
        return reach // 2, reach - reach // 2
    if padding == "valid":
        return 0, 0
    return _at(padding, spatial), _at(padding, spatial)


_HANDLERS: dict[str, Callable[[TimeWalk, Node], Fact | None]] = {
    "getitem": TimeWalk._getitem,
    "_symbolic_multi_out": TimeWalk._recurrent,
    "select": TimeWalk._select,
    "slice": TimeWalk._slice,
    "index": TimeWalk._index,
    "index_select": TimeWalk._index,
    "gather": TimeWalk._index,
    "split": TimeWalk._split,
    "split_with_sizes": TimeWalk._split,
    "chunk": TimeWalk._split,
    "unbind": TimeWalk._split,
    "tensor_split": TimeWalk._split,
    "pad": TimeWalk._pad,
    "constant_pad_nd": TimeWalk._pad,
    "cat": TimeWalk._cat,
    **dict.fromkeys(_CONVOLUTIONS, TimeWalk._convolution),
}
