"""Which axes of a module's tensors are batch and time, and how they become the public `[batch, time, *row]`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Axes:
    """Batch and time axis of one tensor as the module has it; None: it has no such axis.

    Attributes:
        merged: batch and time are one axis, `batch`; True where batch varies slowest (`[batch * time, ...]`).
    """

    batch: int | None
    time: int | None = None
    merged: bool | None = None

    def to_module(self, public: Tensor) -> Tensor:
        """From `[batch, time, *row]` (or `[batch, *row]`) to the module's own order."""
        if self.batch is None:
            return public
        if self.time is None:
            return torch.movedim(public, 0, self.batch) if self.batch else public
        if (self.batch, self.time) == (0, 1):
            return public
        return torch.movedim(public, (0, 1), (self.batch, self.time))

    def to_public(self, own: Tensor, batch: int) -> Tensor:
        """From the module's own order to `[batch, time, *row]` (or `[batch, *row]`); `batch` splits a merged axis."""
        if self.merged is not None:
            axis = self.batch or 0
            shape = list(own.shape)
            shape[axis : axis + 1] = [batch, -1] if self.merged else [-1, batch]
            return torch.movedim(own.reshape(shape), (axis, axis + 1), (0, 1) if self.merged else (1, 0))
        if self.batch is None:
            return own
        if self.time is None:
            return torch.movedim(own, self.batch, 0) if self.batch else own
        if (self.batch, self.time) == (0, 1):
            return own
        return torch.movedim(own, (self.batch, self.time), (0, 1))

    def row(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The row shape: the module's `shape` without batch and time."""
        return tuple(size for axis, size in enumerate(shape) if axis not in {self.batch, self.time})


def resize(example: Tensor, axes: Axes, sizes: tuple[int, int], seed: int, *, widen: bool = False) -> Tensor:
    """Another input like `example` with other batch and time: its own values in another order, floats jittered.

    Integers keep to the example's range; `widen` draws a constant c from {c, c + 1}, so that two seeds differ.
    """
    batch, time = sizes
    generator = torch.Generator().manual_seed(seed)
    value = example
    for axis, size in ((axes.batch, batch), (axes.time, time)):
        if axis is not None:
            picked = torch.randint(0, example.shape[axis], (size,), generator=generator)
            value = value.index_select(axis, picked)
    if axes.batch is None:
        return value.clone()
    if value.is_floating_point():
        spread = float(example.std()) if example.numel() > 1 else 0.0
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)
        return value * (1 + 0.25 * noise) + noise * (0.25 * spread or 0.5)
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator) < 0.5
    low, high = int(example.min()), int(example.max())
    top = max(high, low + 1) if widen else high
    return torch.randint(low, top + 1, value.shape, generator=generator, dtype=value.dtype)
