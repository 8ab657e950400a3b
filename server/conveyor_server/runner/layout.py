"""Where the rows, the time steps and the window of a graph's own tensors lie, resolved against the graph.

Invariant: a Layout's row shape has sizes only, and a graph that fixes a dimension is never contradicted. What it says
of a tensor is enough to place rows `[batch, time, *shape]` into it and to take them out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import Batch, Window
from conveyor_server.runner.foreign import Dim, Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """One tensor's axes. Its public form is `[batch, time, *shape]`, for a state `[batch, *shape]`.

    Attributes:
        name: of the graph's tensor.
        dtype: of its elements.
        batch_axis: its axis of rows, or None.
        time_axis: its axis of time steps, or None.
        shape: of one row and time step, without both axes and without the window.
        window: what a run sees of earlier time steps in front of the new one.
    """

    name: str
    dtype: np.dtype[np.generic]
    batch_axis: int | None
    time_axis: int | None
    shape: tuple[int, ...]
    window: Window | None = None

    @property
    def order(self) -> list[int]:
        """The tensor's own axes in public order: rows, time steps, the others; without those that it has not."""
        special = [axis for axis in (self.batch_axis, self.time_axis) if axis is not None]
        return special + [axis for axis in range(len(self.shape) + len(special)) if axis not in special]

    @property
    def window_axis(self) -> int:
        """The window's axis in `[batch, *shape]`, or in `[batch, time, *shape]` where the tensor has a time axis."""
        if self.window is None:
            raise AssertionError(f"{self.name} has no window")
        return 1 + [axis for axis in self.order if axis != self.batch_axis].index(self.window.axis)

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Of what one session keeps for the window: `[*shape]`, or `[1, *shape]`, with its size in its own axis."""
        if self.window is None:
            raise AssertionError(f"{self.name} has no window")
        shape = [*([] if self.time_axis is None else [1]), *self.shape]
        shape[self.window_axis - 1] = self.window.size
        return tuple(shape)


def lay_out(
    tensor: Tensor,
    batch: Batch,
    *,
    batch_axis: int | None,
    time_axis: int | None = None,
    shape: tuple[int, ...] | None = None,
    window: Window | None = None,
) -> Layout:
    """The layout of a tensor as described, checked against what the graph fixes.

    Args:
        tensor: as the graph declares it.
        batch: whether a run is any number of rows, or one.
        batch_axis: as described.
        time_axis: as described.
        shape: as described; None takes the graph's.
        window: as described.

    Raises:
        RunnerUnavailable: the two disagree, or neither says how large a row is.
    """
    special = {axis for axis in (batch_axis, time_axis) if axis is not None}
    dims = tensor.dims if tensor.dims is not None else _dims_of(tensor, shape, special)
    for axis in (*special, *([] if window is None else [window.axis])):
        if axis >= len(dims):
            raise RunnerUnavailable(f"{tensor.name!r} has {len(dims)} axes, {tensor}: axis {axis} is none of them")
    if batch_axis is not None:
        _check_batch(tensor, dims[batch_axis], batch, batch_axis)
    if time_axis is not None:
        _check_time(tensor, dims[time_axis], time_axis, window)
    row = [axis for axis in range(len(dims)) if axis not in special]
    if shape is not None and len(shape) != len(row):
        raise RunnerUnavailable(
            f"{tensor.name!r} is {tensor}, and its shape {list(shape)} is not of its {len(row)} axes beside those of "
            "rows and time steps"
        )
    sizes = [
        _size(tensor, axis, dims[axis], None if shape is None else shape[index], window)
        for index, axis in enumerate(row)
    ]
    return Layout(tensor.name, tensor.dtype, batch_axis, time_axis, tuple(sizes), window)


def _dims_of(tensor: Tensor, shape: tuple[int, ...] | None, special: set[int]) -> Sequence[Dim]:
    if shape is None:
        raise RunnerUnavailable(f"the file does not say of what shape {tensor.name!r} is: say its `shape`")
    return [None] * (len(shape) + len(special))


def _check_batch(tensor: Tensor, dim: Dim, batch: Batch, axis: int) -> None:
    if not isinstance(dim, int):
        return
    if dim > 1:
        raise RunnerUnavailable(
            f"{tensor.name!r} is {tensor}: axis {axis} is fixed at {dim} and cannot count the rows of a run; name "
            "another axis, or make the file anew with a dynamic batch"
        )
    if batch != "one":
        raise RunnerUnavailable(
            f"{tensor.name!r} is {tensor}: axis {axis} is fixed at 1, so a run is one row: write `batch: one`"
        )


def _check_time(tensor: Tensor, dim: Dim, axis: int, window: Window | None) -> None:
    before = window.size if window is not None and window.axis == axis else 0
    if isinstance(dim, int) and dim != before + 1:
        raise RunnerUnavailable(
            f"{tensor.name!r} is {tensor}: axis {axis} is fixed at {dim}, and a run has one time step"
            + (f" behind {before} of its window" if before else "")
            + "; a chunk of a fixed length is the `shape` of one time step: write no `time_axis`"
        )


def _size(tensor: Tensor, axis: int, dim: Dim, said: int | None, window: Window | None) -> int:
    before = window.size if window is not None and window.axis == axis else 0
    if not isinstance(dim, int):
        if said is None:
            raise RunnerUnavailable(
                f"{tensor.name!r} is {tensor}: the file leaves axis {axis} open; say the `shape` of one time step"
            )
        return said
    if said is not None and said + before != dim:
        told = f" and {before} of its window" if before else ""
        raise RunnerUnavailable(f"{tensor.name!r} is {tensor}: its axis {axis} is {dim}, and {said}{told} was said")
    if dim <= before:
        raise RunnerUnavailable(f"{tensor.name!r} is {tensor}: a window of {before} leaves nothing of axis {axis}")
    return dim - before
