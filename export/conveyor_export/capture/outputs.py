"""What forward() returns: its tensors by name, their batch and time axes, and which of them are only the new state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from conveyor_export.capture.axes import Axes
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layout import BATCH, Layout, Pace, Prober
from conveyor_export.capture.observe import Observation


@dataclass(frozen=True, slots=True)
class OutputLeaf:
    """One returned tensor.

    Attributes:
        index: position among the returned tensors, flattened.
        keys: where it is in the returned structure.
        axes: batch and time.
        has_time: it has a value at every time step.
        shape, dtype: as returned in the probe.
        problem: why it is not one value for each time step, if it is not; a better reason may be found in the trace.
    """

    index: int
    keys: tuple[str | int, ...]
    axes: Axes
    has_time: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    problem: str = ""


def flatten(output: Any) -> list[Tensor]:
    """The returned tensors, flattened; None is nothing."""
    return [value for _, value in _items(output)]


def _items(output: Any) -> list[tuple[tuple[str | int, ...], Tensor]]:
    items = []
    for keys, value in pytree.tree_flatten_with_path(output, is_leaf=lambda node: isinstance(node, PackedSequence))[0]:
        if value is None:
            continue
        if isinstance(value, PackedSequence):
            raise CaptureError("it returns a PackedSequence", advice="Return pad_packed_sequence(...)[0]")
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"it returns a {type(value).__name__}, which is not a tensor",
                advice="Return a tensor, or a tuple, dict or NamedTuple of tensors",
            )
        items.append((tuple(_key(key) for key in keys), value))
    return items


def _key(key: Any) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if isinstance(value, int) else str(value)
    return str(key)


def find_outputs(prober: Prober, layout: Layout) -> list[OutputLeaf]:
    """Axes of everything returned, from three runs of which two differ in one size each.

    Raises:
        CaptureError: an output has no batch axis, or a number of time steps other than the input's.
    """
    if layout.pace is Pace.SINGLE:
        base, rows = (_shapes(prober, layout, batch, 1) for batch in (BATCH, BATCH + 2))
        return [_leaf(index, item, rows[index][1], item[1], layout) for index, item in enumerate(base)]
    time, longer = layout.time, layout.time + 3
    base = _shapes(prober, layout, BATCH, time)
    rows = _shapes(prober, layout, BATCH + 2, time)
    steps = _shapes(prober, layout, BATCH, longer)
    if not len(base) == len(rows) == len(steps):
        raise CaptureError(
            "the number of tensors that it returns depends on the number of rows or time steps",
            advice="Stack the answers of all time steps into one tensor",
        )
    leaves = [_leaf(i, item, rows[i][1], steps[i][1], layout) for i, item in enumerate(base)]
    return [
        _with_order(prober, layout, leaf) if leaf.axes.merged is not None and not leaf.problem else leaf
        for leaf in leaves
    ]


_Item = tuple[tuple[str | int, ...], Tensor]


def _shapes(prober: Prober, layout: Layout, batch: int, time: int) -> list[_Item]:
    return _items(prober.run(prober.draw(layout, batch, time)).output)


def _leaf(index: int, item: _Item, rows: Tensor, steps: Tensor, layout: Layout) -> OutputLeaf:
    keys, base = item
    name = output_name(keys)
    shape = tuple(base.shape)
    if not base.dim() == rows.dim() == steps.dim():
        raise CaptureError(f"the rank of output {name!r} depends on the number of rows or time steps")
    batch_axes = [axis for axis, size in enumerate(shape) if rows.shape[axis] != size]
    time_axes = [axis for axis, size in enumerate(shape) if steps.shape[axis] != size]
    if len(batch_axes) != 1 or len(time_axes) > 1:
        raise CaptureError(
            f"output {name!r} of shape {list(shape)} for {BATCH} rows of {layout.time} time steps has "
            f"{len(batch_axes)} axes of rows and {len(time_axes)} of time steps",
            advice="Return tensors with one row per sequence and at most one axis of time",
        )
    batch, time = batch_axes[0], time_axes[0] if time_axes else None
    single = layout.pace is Pace.SINGLE
    if time is None:
        return OutputLeaf(index, keys, Axes(batch), single, shape, base.dtype)
    merged = batch == time
    expected = layout.time * (BATCH if merged else 1)
    problem = ""
    if shape[time] != expected:
        problem = (
            f"output {name!r} has {shape[time]} steps for {expected} time steps: an answer is not at its own time "
            "step, as after a convolution over time without left padding, or with a stride"
        )
    axes = Axes(batch, None, True) if merged else Axes(batch, time)
    return OutputLeaf(index, keys, axes, True, shape, base.dtype, problem)


def _with_order(prober: Prober, layout: Layout, leaf: OutputLeaf) -> OutputLeaf:
    """Settles whether batch or time varies slowest in a merged axis, by running the first row alone."""
    values = prober.draw(layout, BATCH, layout.time)
    first = {}
    for name, value in values.items():
        axis = layout.axes[name].batch
        first[name] = value if axis is None else value.narrow(axis, 0, 1)
    whole = flatten(prober.run(values).output)[leaf.index]
    alone = flatten(prober.run(first).output)[leaf.index]
    batch_major = whole.narrow(leaf.axes.batch or 0, 0, layout.time)
    axes = Axes(leaf.axes.batch, None, torch.allclose(batch_major, alone, atol=1e-5))
    return OutputLeaf(leaf.index, leaf.keys, axes, True, leaf.shape, leaf.dtype)


def output_name(keys: Sequence[str | int]) -> str:
    """`hidden`, `scores.left`, `output_1`: keys as the user wrote them, positions as numbers of `output`."""
    if not keys:
        return "output"
    if isinstance(keys[0], int):
        return "output_" + "_".join(map(str, keys))
    return ".".join(map(str, keys))


def returned_stacks(observation: Observation) -> set[int]:
    """Positions of returned tensors that are the whole new state of a recurrent call, `[layers, batch, size]`."""
    found = set()
    for index, value in enumerate(flatten(observation.output)):
        for call in observation.calls:
            if call.cell:
                continue
            for role in call.roles:
                stack = torch.stack([layer[role] for layer in call.final])
                if value.shape == stack.shape and torch.equal(value, stack):
                    found.add(index)
    return found
