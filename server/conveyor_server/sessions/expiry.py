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
# Entries of forgotten things that the heap may hold beyond as many as there are things.
_SLACK = 64


class Deadlines(Generic[T]):
    """Deadlines in seconds of the driver's clock. Core thread only.

    Args:
        deadline_of: the deadline of a thing as it is now; infinity: none.
    """

    def __init__(self, deadline_of: Callable[[T], float]) -> None:
        self._deadline_of = deadline_of
        self._order = itertools.count()
        # The heap holds numbers only, so that a thing that was forgotten is free at once, whenever its entry comes up.
        self._heap: list[tuple[float, int]] = []
        self._things: dict[int, T] = {}
        self._watched: dict[T, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, thing: T, deadline: float) -> None:
        """Looks at a thing at `deadline`, if it is not looked at before."""
        known = self._watched.get(thing)
        if deadline >= (math.inf if known is None else known[0]):
            return
        self.forget(thing)
        entry = (deadline, next(self._order))
        self._watched[thing] = entry
        self._things[entry[1]] = thing
        heapq.heappush(self._heap, entry)

    def forget(self, thing: T) -> None:
        """Looks at a thing no more, and holds it no longer."""
        known = self._watched.pop(thing, None)
        if known is None:
            return
        del self._things[known[1]]
        if len(self._heap) > 2 * len(self._things) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._things]
            heapq.heapify(self._heap)

    def due(self, now: float) -> Iterator[T]:
        """Takes out the things whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now:
            thing = self._things.pop(heapq.heappop(self._heap)[1], None)
            if thing is None:
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
