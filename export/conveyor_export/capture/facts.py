"""What the time walk knows of a traced value: its time axis, how far it looks ahead, and what else of time is in it."""

from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Fact:
    """One value of the trace.

    Element i of the time axis belongs to time step i + shift, and the axis has T + extra elements.

    Attributes:
        axes: axes whose size depends on the number of time steps T.
        extra: size of the only time axis minus T; None where it is merged with another axis.
        shift: steps that an element looks ahead; negative: it looks back.
        last: it holds values of the last time step.
        position: the node that made it depend on the absolute time step.
        lengths: it was made from the rows' lengths.
        fill: the one number that the whole tensor holds, if known.
        untrimmed: the same tensor before steps were cut off its end.
    """

    axes: tuple[int, ...] = ()
    extra: int | None = 0
    shift: int = 0
    last: bool = False
    position: Node | None = None
    lengths: bool = False
    fill: float | None = None
    untrimmed: Node | None = None

    @property
    def excess(self) -> int:
        """Trailing elements that belong to no time step of the input: right padding. They are never computed."""
        return max(0, (self.extra or 0) + self.shift)

    @property
    def aligned(self) -> bool:
        """It has one element for each time step, none of which looks ahead."""
        return self.extra == 0 and self.shift <= 0 and not self.excess


class TimeSymbol:
    """The number of time steps T as torch.export's shapes have it."""

    def __init__(self, size: torch.SymInt, batch: torch.SymInt) -> None:
        self._time = size.node.expr
        self._batch = batch.node.expr

    def axes(self, value: Any) -> tuple[int, ...]:
        """Axes of a tensor whose size depends on T."""
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(axis for axis, size in enumerate(value.shape) if self.depends(size))

    def depends(self, size: Any) -> bool:
        """True where a size depends on T."""
        return isinstance(size, torch.SymInt) and self._time in size.node.expr.free_symbols

    def surplus(self, size: Any) -> int | None:
        """A size minus T where that is a number."""
        difference = sympy.simplify(_expr(size) - self._time)
        return int(difference) if difference.is_Integer else None

    def batch_axis(self, value: torch.Tensor) -> int | None:
        """The axis of rows, where it is an axis of its own."""
        axes = [axis for axis, size in enumerate(value.shape) if _expr(size) == self._batch]
        return axes[0] if len(axes) == 1 else None


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def path_of(node: Node) -> str:
    """Path, inside the user's module, of the submodule that made a node; a trace holds the user's as `module`."""
    stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1] if stack else ""
    return path.removeprefix("module.") if path.startswith("module.") else ""
