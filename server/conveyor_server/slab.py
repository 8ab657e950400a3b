"""Slots of a slab: which rows of state are free. Pure integers; the rows themselves belong to the runner.

Invariant: a slot is free or held by exactly one holder, and `free + held == capacity`.
"""

from collections.abc import Collection


class SlotPool:
    """A free list over slots 0 to capacity - 1. Core thread only."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # Last in, first out: the slab touches as few pages as there were sessions at once.
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that can be acquired."""
        return len(self._free)

    def acquire(self) -> int:
        """Takes a free slot; IndexError when there is none (the engine's reserve makes that a defect)."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Gives a slot back; its row may be overwritten from now on."""
        self._free.append(slot)

    def check(self, held: Collection[int]) -> None:
        """Raises AssertionError unless exactly the slots in `held` are not free: called when all is idle."""
        free = set(self._free)
        if len(free) != len(self._free) or len(set(held)) != len(held):
            raise AssertionError("a slot is listed twice")
        if free & set(held) or len(free) + len(held) != self.capacity:
            raise AssertionError(f"{len(free)} free and {len(held)} held slots of {self.capacity}")
