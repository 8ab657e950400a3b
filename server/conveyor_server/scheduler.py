"""Which steps run next. Pure: no clock, no I/O, no lock.

Invariants: a batch holds steps of one length bucket, so padding at most doubles the work; every bucket that has steps
is served before any is served again, so a long prompt never starves one-token sessions; a step that has begun goes
first in its bucket, so the number of half-done steps stays bounded.
"""

from collections import deque
from collections.abc import Callable

from conveyor_server.engine.step import Step


class Scheduler:
    """Ready steps of one engine, at most one per session, in buckets of equal power-of-two length.

    Args:
        max_batch: rows of one batch.
        quantum: time steps of one row in one batch; longer steps take several batches.
        max_batch_time_steps: rows times padded time steps of one batch (a batch always takes at least one row).
    """

    def __init__(self, *, max_batch: int, quantum: int, max_batch_time_steps: int) -> None:
        self.max_batch = max_batch
        self.quantum = quantum
        self.max_batch_time_steps = max_batch_time_steps
        self._buckets: list[deque[Step]] = [deque() for _ in range(self._bucket(quantum) + 1)]
        # Bucket indices, least recently served first.
        self._turns = list(range(len(self._buckets)))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, step: Step) -> None:
        """Queues a step; one that has begun goes to the front of its bucket."""
        bucket = self._buckets[self._bucket(self.share(step))]
        if step.begun:
            bucket.appendleft(step)
        else:
            bucket.append(step)
        self._size += 1

    def remove(self, step: Step) -> bool:
        """Takes a step out; False when it was not queued."""
        try:
            self._buckets[self._bucket(self.share(step))].remove(step)
        except ValueError:
            return False
        self._size -= 1
        return True

    def share(self, step: Step) -> int:
        """Time steps that the next batch would take of a step, 1 to quantum."""
        return min(step.remaining, self.quantum)

    def take(self, may_begin: Callable[[int], bool]) -> list[Step]:
        """Takes the steps of the next batch, empty when nothing can run.

        Args:
            may_begin: whether one more step longer than the quantum may begin, given how many this batch began.
        """
        for turn, index in enumerate(self._turns):
            bucket = self._buckets[index]
            if not bucket:
                continue
            steps = self._take_from(bucket, 1 << index, may_begin)
            if steps:
                self._turns.append(self._turns.pop(turn))
                self._size -= len(steps)
                return steps
        return []

    def _take_from(self, bucket: deque[Step], padded: int, may_begin: Callable[[int], bool]) -> list[Step]:
        rows = max(1, min(self.max_batch, self.max_batch_time_steps // padded))
        steps: list[Step] = []
        begun = 0
        while bucket and len(steps) < rows:
            step = bucket[0]
            if step.remaining > self.quantum and not step.begun:
                if not may_begin(begun):
                    break
                begun += 1
            steps.append(bucket.popleft())
        return steps

    @staticmethod
    def _bucket(length: int) -> int:
        return (length - 1).bit_length()
