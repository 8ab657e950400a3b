"""How much memory the slabs of all models may take together.

Invariant: what is taken is given back once, by whoever took it; a slab that does not fit is refused before any of it
is allocated, and the models that are there go on.
"""

import threading

from conveyor_server.runner.base import RunnerUnavailable


class Lease:
    """A part of the budget that a runner has. Any thread."""

    def __init__(self, budget: "StateBudget", size: int) -> None:
        self._budget = budget
        self._size = size

    def release(self) -> None:
        """The slab is gone. Again: nothing happens."""
        size, self._size = self._size, 0
        self._budget.give_back(size)


class StateBudget:
    """Any thread.

    Args:
        most: bytes of all slabs together; 0: any number.

    Attributes:
        taken: bytes of the slabs that are there.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self.taken = 0
        self._lock = threading.Lock()

    def take(self, row_bytes: int, rows: int) -> Lease:
        """A part for a slab of so many rows.

        Raises:
            RunnerUnavailable: it is not left.
        """
        size = row_bytes * rows
        with self._lock:
            if self._most and self.taken + size > self._most:
                left = self._most - self.taken
                raise RunnerUnavailable(
                    f"its state takes {size} bytes ({rows} rows of {row_bytes}), and of --max-state-bytes {self._most} "
                    f"only {left} are left: lower --max-sessions, unload a model, or raise --max-state-bytes"
                )
            self.taken += size
        return Lease(self, size)

    def give_back(self, size: int) -> None:
        """See Lease."""
        with self._lock:
            self.taken -= size
