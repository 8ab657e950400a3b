"""What is due when: a heap of deadlines that may move on, or vanish, without telling.

Invariant: at most one entry of a thing counts, the earliest asked for; when it comes up, the thing is asked for
its deadline as it is then, and watched on when that is later. So postponing is free and costs no entry.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Deadlines(Generic[T]):
    """Deadlines in seconds of the driver's clock. Core thread only.

    Args:
        deadline_of: the deadline of a thing as it is now; infinity: none.
    """

    def __init__(self, deadline_of: Callable[[T], float]) -> None:
        self._deadline_of = deadline_of
        self._order = itertools.count()
        self._heap: list[tuple[float, int, T]] = []
        self._watched: dict[T, float] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, thing: T, deadline: float) -> None:
        """Looks at a thing at `deadline`, if it is not looked at before."""
        if deadline < self._watched.get(thing, math.inf):
            self._watched[thing] = deadline
            heapq.heappush(self._heap, (deadline, next(self._order), thing))

    def due(self, now: float) -> Iterator[T]:
        """Takes out the things whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now:
            at, _, thing = heapq.heappop(self._heap)
            if self._watched.get(thing) != at:
                continue
            del self._watched[thing]
            deadline = self._deadline_of(thing)
            if deadline <= now:
                yield thing
            else:
                self.watch(thing, deadline)

    def next_at(self) -> float:
        """No thing is due before this time; infinity when nothing is watched."""
        return self._heap[0][0] if self._heap else math.inf
