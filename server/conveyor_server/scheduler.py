"""Which steps run next. Pure: no clock, no I/O, no lock.

Invariants: a batch holds steps of one length bucket, so padding at most doubles the work; every bucket that has steps
is served before any is served again, so a long prompt never starves one-token sessions; a step that has begun goes
first in its bucket, so the number of half-done steps stays bounded.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.step import Step

Entry: TypeAlias = Step | Cohort


class Scheduler:
    """Ready steps of one engine, at most one per session, in buckets of equal power-of-two length.

    Args:
        max_batch: rows of one batch.
        quantum: time steps of one row in one batch; longer steps take several batches, cohorts are never longer.
        max_batch_time_steps: rows times padded time steps of one batch (a batch always takes at least one row).
    """

    def __init__(self, *, max_batch: int, quantum: int, max_batch_time_steps: int) -> None:
        self.max_batch = max_batch
        self.quantum = quantum
        self.max_batch_time_steps = max_batch_time_steps
        self._buckets: list[deque[Entry]] = [deque() for _ in range(self._bucket(quantum) + 1)]
        # Bucket indices, least recently served first.
        self._turns = list(range(len(self._buckets)))
        self._size = 0

    def __len__(self) -> int:
        """Steps that wait, those in cohorts included."""
        return self._size

    def add(self, step: Step) -> None:
        """Queues a step; one that has begun goes to the front of its bucket."""
        bucket = self._buckets[self._bucket(self.share(step))]
        if step.begun:
            bucket.appendleft(step)
        else:
            bucket.append(step)
        self._size += 1

    def add_cohort(self, cohort: Cohort) -> None:
        """Queues the steps of a cohort."""
        self._buckets[self._bucket(cohort.length)].append(cohort)
        self._size += cohort.rows

    def remove(self, step: Step) -> bool:
        """Takes a step out; False when it was not queued."""
        try:
            self._buckets[self._bucket(self.share(step))].remove(step)
        except ValueError:
            return False
        self._size -= 1
        return True

    def left(self, cohort: Cohort, member: int) -> None:
        """A member leaves a cohort that is queued."""
        cohort.taken.add(member)
        self._size -= 1

    def waits(self, length: int) -> bool:
        """A step of about that many time steps waits."""
        return bool(self._size and self._buckets[self._bucket(min(length, self.quantum))])

    def share(self, step: Step) -> int:
        """Time steps that the next batch would take of a step, 1 to quantum."""
        return min(step.remaining, self.quantum)

    def take(self, may_begin: Callable[[int], bool]) -> list[Entry]:
        """Takes the steps of the next batch, empty when nothing can run.

        Args:
            may_begin: whether one more step longer than the quantum may begin, given how many this batch began.
        """
        for turn, index in enumerate(self._turns):
            bucket = self._buckets[index]
            if not bucket:
                continue
            entries, rows = self._take_from(bucket, 1 << index, may_begin)
            if entries:
                self._turns.append(self._turns.pop(turn))
                self._size -= rows
                return entries
        return []

    def _take_from(
        self, bucket: deque[Entry], padded: int, may_begin: Callable[[int], bool]
    ) -> tuple[list[Entry], int]:
        room = most = max(1, min(self.max_batch, self.max_batch_time_steps // padded))
        entries: list[Entry] = []
        begun = 0
        while bucket and room:
            entry = bucket[0]
            if isinstance(entry, Cohort):
                entry.compact()
                if entry.rows > room:
                    entries.append(entry.split(room))
                    room = 0
                    break
                bucket.popleft()
                if entry.rows:
                    entries.append(entry)
                    room -= entry.rows
                continue
            if entry.remaining > self.quantum and not entry.begun:
                if not may_begin(begun):
                    break
                begun += 1
            entries.append(entry)
            bucket.popleft()
            room -= 1
        return entries, most - room

    @staticmethod
    def _bucket(length: int) -> int:
        return (length - 1).bit_length()
