"""Slots of a slab: which rows of state are free. Pure integers; the rows themselves belong to the runner.

Invariant: a slot is free or held by exactly one holder, and `free + held == capacity`.
"""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray


class SlotPool:
    """A free list over slots 0 to capacity - 1. Core thread only.

    Attributes:
        capacity: how many slots there are.
        free: how many can be acquired.
        stack: int32 `[capacity]`, whose first `free` are the free slots; the last of these is acquired next.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = capacity
        # A stack, last in, first out: the slab touches as few pages as there were sessions at once.
        self.stack = np.arange(capacity - 1, -1, -1, dtype=np.int32)

    def acquire(self) -> int:
        """Takes a free slot; IndexError when there is none (the engine's reserve makes that a defect)."""
        return int(self.acquire_many(1)[0])

    def acquire_many(self, count: int) -> NDArray[np.int64]:
        """Takes `count` free slots, `[count]`; IndexError when there are fewer."""
        if count > self.free:
            raise IndexError(f"{count} slots are wanted and {self.free} of {self.capacity} are free")
        self.free -= count
        return self.stack[self.free : self.free + count].astype(np.int64)

    def release(self, slot: int) -> None:
        """Gives a slot back; its row may be overwritten from now on."""
        self.stack[self.free] = slot
        self.free += 1

    def release_many(self, slots: NDArray[np.int64]) -> None:
        """Gives slots `[count]` back."""
        self.stack[self.free : self.free + len(slots)] = slots
        self.free += len(slots)

    def check(self, held: Collection[int]) -> None:
        """Raises AssertionError unless exactly the slots in `held` are not free: called when all is idle."""
        free = set(self.stack[: self.free].tolist())
        if len(free) != self.free or len(set(held)) != len(held):
            raise AssertionError("a slot is listed twice")
        if free & set(held) or len(free) + len(held) != self.capacity:
            raise AssertionError(f"{len(free)} free and {len(held)} held slots of {self.capacity}")
