"""What single operators do to the time axis: cutting, padding, joining, convolving, picking steps.

A rule returns the operator's Fact, or None where time is not among the axes that it touches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch.fx import Node

from conveyor_export.capture.facts import Fact, path_of
from conveyor_export.capture.mixing import arguments_of, operator_of
from conveyor_export.capture.rewrite import LastStep, LookBack, Trim
from conveyor_export.capture.walk import Walk, rank

_END = 2**62


def _getitem(walk: Walk, node: Node) -> Fact:
    source = cast(Node, node.args[0])
    fact = walk.fact(source)
    if operator_of(source) == "_symbolic_multi_out" and node.args[1] != 0:
        return Fact(last=True)
    axes = walk.axes(node)
    return replace(fact, axes=axes, extra=walk.surplus(node, axes))


def _recurrent(walk: Walk, node: Node) -> Fact:
    fact = walk.fact(cast(list[Node], node.args[0])[0])
    if not fact.axes:
        walk.refuse(node, "it runs along another axis than time")
    if fact.axes != (0,) or not fact.aligned:
        walk.refuse(node, "its input is padded, cut or shifted over time, so that its steps are not those of the input")
    walk.refuse_position(fact)
    walk.order += cast(list[str], node.kwargs["metadata_props_values"])
    return Fact((0,), 0, fact.shift)


def _select(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    source, axis = given["self"], given["dim"]
    fact = walk.fact(source)
    axis %= rank(source)
    if axis not in fact.axes:
        return None
    if walk.offset(given["index"], fact) != -1:
        walk.refuse(node, f"it reads time step {given['index']} of the sequence, which is not known as time goes on")
    return _last(walk, node, fact, axis, keep=False)


def _slice(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    source = given["self"]
    fact = walk.fact(source)
    axis = (given["dim"] or 0) % rank(source)
    if axis not in fact.axes:
        return None
    if given["step"] != 1:
        walk.refuse(node, "it takes every n-th time step, so that answers have another pace than inputs")
    start, end = given["start"] or 0, given["end"]
    if start == -1 or (start != 0 and walk.offset(start, fact) == -1):
        return _last(walk, node, fact, axis, keep=True)
    if not isinstance(start, int) or start < 0:
        walk.refuse(node, "it reads the last steps of the sequence, of which a chunk may have fewer")
    if fact.extra is None:
        walk.refuse(node, "it cuts an axis in which time is merged with another")
    cut = 0 if end is None or (isinstance(end, int) and end >= _END) else walk.offset(end, fact)
    if cut is None or (isinstance(end, int) and 0 <= end < _END):
        walk.refuse(node, "it keeps a fixed number of time steps from the beginning of the sequence")
    return _trim(walk, node, fact, axis, start=start, cut=min(cut or 0, 0))


def _trim(walk: Walk, node: Node, fact: Fact, axis: int, *, start: int, cut: int) -> Fact:
    if fact.shift + start > 0:
        walk.refuse(node, f"it drops the first {start} time steps, so that answers run ahead of inputs")
    source = arguments_of(node)["self"]
    extra = (fact.extra or 0) - start + cut
    made = replace(fact, extra=extra, shift=fact.shift + start, untrimmed=None)
    if start == 0 and cut < 0 and not fact.excess:
        made = replace(made, untrimmed=fact.untrimmed or source)
    if fact.excess or made.excess:
        kept = (fact.extra or 0) - fact.excess - start - (extra - made.excess)
        walk.rewrites[node.name] = Trim(axis, start, kept)
    return made


def _last(walk: Walk, node: Node, fact: Fact, axis: int, *, keep: bool) -> Fact:
    if fact.extra is None or fact.extra < 0 or fact.shift > 0 or fact.excess:
        walk.refuse(node, "it takes the last element of a time axis that is padded, cut or merged with another")
    walk.rewrites[node.name] = LastStep(axis, walk.batch_axis(node, arguments_of(node)["self"]), fact.extra or 0, keep)
    return Fact(last=True, position=fact.position)


def _index(walk: Walk, node: Node) -> Fact | None:
    """Indexing by tensors: the last step by lengths, or a mix of steps."""
    given = arguments_of(node)
    source = given["self"]
    fact = walk.fact(source)
    if not fact.axes:
        return None
    operator = operator_of(node)
    indices = given["indices"] if operator == "index" else [given["index"]]
    if operator == "index":
        touched = any(position in fact.axes for position, item in enumerate(indices) if item is not None)
    else:
        touched = given["dim"] % rank(source) in fact.axes
    if not touched:
        return None
    if not any(isinstance(item, Node) and walk.fact(item).lengths for item in indices):
        walk.refuse(node, "it picks time steps by index, which may lie in the future or in an earlier chunk")
    return Fact(walk.axes(node), None, last=True)


def _split(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    source = given["self"]
    if given["dim"] % rank(source) in walk.fact(source).axes:
        walk.refuse(node, "it splits the sequence along time into a fixed number of parts")
    return None


def _pad(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    source, pads = given["self"], list(given["pad"])
    fact = walk.fact(source)
    last = rank(source) - 1
    sides = {last - index // 2: (pads[index], pads[index + 1]) for index in range(0, len(pads), 2)}
    axis = next((axis for axis in fact.axes if sides.get(axis, (0, 0)) != (0, 0)), None)
    if axis is None:
        return None
    left, right = sides[axis]
    if given.get("mode", "constant") != "constant":
        walk.refuse(node, f"it pads time with {given['mode']} values, which repeat steps of the sequence")
    if not isinstance(left, int) or not isinstance(right, int) or left < 0:
        walk.refuse(node, "it cuts or pads the beginning of the sequence by an amount that is not fixed")
    return _look_back(walk, node, source, axis, (left, right), float(given.get("value") or 0.0))


def _cat(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    parts = given["tensors"]
    axis = given["dim"] % rank(node)
    timed = [index for index, item in enumerate(parts) if axis in walk.fact(item).axes]
    if not timed:
        return None
    if len(timed) > 1:
        walk.refuse(node, "it joins sequences one after the other along time")
    sizes, fills = [], []
    for index, item in enumerate(parts):
        if index != timed[0]:
            sizes.append(item.meta["val"].shape[axis])
            fills.append(walk.fact(item).fill)
    if any(fill is None or fill != fills[0] for fill in fills):
        walk.refuse(node, "it joins other values to the sequence along time; only constant padding can be streamed")
    before, after = sum(sizes[: timed[0]]), sum(sizes[timed[0] :])
    return _look_back(walk, node, parts[timed[0]], axis, (before, after), (fills[0] or 0.0) if fills else 0.0)


def _convolution(walk: Walk, node: Node) -> Fact | None:
    given = arguments_of(node)
    source, weight = given["input"], given["weight"]
    fact = walk.fact(source)
    axis = next((axis for axis in fact.axes if axis >= 2), None)
    if axis is None:
        return None
    spatial = axis - 2
    kernel = weight.meta["val"].shape[axis]
    stride, dilation = _at(given["stride"], spatial), _at(given["dilation"], spatial)
    reach = (kernel - 1) * dilation
    left, right = _paddings(given["padding"], spatial, reach)
    if stride != 1:
        walk.refuse(node, f"it convolves over time with stride {stride}, so that answers have another pace than inputs")
    ahead = fact.shift + reach - left
    if ahead > 0:
        walk.refuse(
            node,
            f"its convolution over time is not causal: it looks {ahead} time steps ahead "
            f"(kernel {kernel}, dilation {dilation}, {left - fact.shift} steps of left padding, {reach} needed)",
        )
    made = _look_back(walk, node, source, axis, (left, right), 0.0)
    return replace(made, extra=(made.extra or 0) - reach, shift=made.shift + reach, untrimmed=None)


def _look_back(  # noqa: PLR0917  the operators' own words: what is padded, where, how much, with what
    walk: Walk, node: Node, source: Node, axis: int, pads: tuple[int, int], fill: float
) -> Fact:
    """Padding on the left becomes the steps before; padding on the right is left away."""
    fact = walk.facts[source]
    left, right = pads
    if fact.extra is None:
        walk.refuse(node, "it pads an axis in which time is merged with another")
    trimmed = 0
    if left and (fact.extra or 0) < 0:
        if fact.untrimmed is None:
            walk.refuse(node, "it pads a sequence that has lost steps at its beginning")
        trimmed = walk.facts[fact.untrimmed].extra or 0
        trimmed -= fact.extra or 0
    if right and (fact.extra or 0) + fact.shift < 0:
        walk.refuse(node, "it pads the end of a sequence that has lost its last steps")
    made = replace(fact, extra=(fact.extra or 0) + left + right, shift=fact.shift - left, fill=None, untrimmed=None)
    operator = operator_of(node)
    key = (operator, path_of(node))
    if left:
        walk.order.append(node.name)
    if left or right:
        walk.rewrites[node.name] = LookBack(
            operator=operator,
            path=key[1],
            ordinal=walk.ordinals[key],
            axis=axis,
            batch_axis=walk.batch_axis(node, source) if left else 0,
            steps=left,
            fill=fill,
            row_shape=_row_shape(walk, node, source, axis, left),
            dtype=source.meta["val"].dtype,
            part=parts.index(source) if (parts := arguments_of(node).get("tensors")) else 0,
            source=source.name,
            untrimmed=fact.untrimmed.name if trimmed and fact.untrimmed else "",
            trimmed=trimmed,
        )
    return made


def _row_shape(walk: Walk, node: Node, source: Node, axis: int, steps: int) -> tuple[int, ...]:
    """Shape of one row's context; empty where there is none."""
    if not steps:
        return ()
    batch_axis = walk.batch_axis(node, source)
    shape = [steps if at == axis else size for at, size in enumerate(source.meta["val"].shape) if at != batch_axis]
    if not all(isinstance(size, int) for size in shape):
        walk.refuse(node, "it looks back over time in a tensor of no fixed size")
    return tuple(shape)


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


# By operator.
RULES: dict[str, Callable[[Walk, Node], Fact | None]] = {
    "getitem": _getitem,
    "_symbolic_multi_out": _recurrent,
    "select": _select,
    "slice": _slice,
    "index": _index,
    "index_select": _index,
    "gather": _index,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "unbind": _split,
    "tensor_split": _split,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "cat": _cat,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
