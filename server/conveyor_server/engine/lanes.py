"""Lanes: where the committed state of each session lives in its engine.

Invariant: a lane's slot is held by that lane alone; a lane without one is fresh: its state is the model's initial one.
"""

import numpy as np
from numpy.typing import NDArray


class Lanes:
    """The slot of each lane, as one array, so that many sessions are looked up and moved at once. Core thread only.

    Attributes:
        held: int64 `[lanes]`, slot + 1, or 0 where fresh: the pages of lanes that never ran are never touched.
    """

    __slots__ = ("held",)

    def __init__(self, count: int) -> None:
        self.held: NDArray[np.int64] = np.zeros(count, np.int64)


class Lane:
    """One of them.

    Args:
        lanes: of its engine.
        index: which.
    """

    __slots__ = ("index", "lanes")

    def __init__(self, lanes: Lanes, index: int) -> None:
        self.lanes = lanes
        self.index = index

    @property
    def slot(self) -> int | None:
        """Row of the slab; None: fresh, the model's initial state."""
        held = int(self.lanes.held[self.index])
        return held - 1 if held else None

    @slot.setter
    def slot(self, slot: int | None) -> None:
        self.lanes.held[self.index] = 0 if slot is None else slot + 1
