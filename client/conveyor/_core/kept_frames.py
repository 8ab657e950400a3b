"""A population's frames that the server's store does not have: what may have to be sent again, row by row.

Invariant: a frame counts against the buffer from its submission until the store has each of its rows that was applied,
and its inputs are kept as long.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from conveyor._core.frame import Seqs
from conveyor._core.frame_step import FrameStep
from conveyor._core.ledger import Ledger
from conveyor._core.unstored import Buffer


class KeptFrames:
    """Frames of which every row was answered or refused, and some row is not stored, in their order.

    Attributes:
        buffer: what is submitted and not in the store.
    """

    def __init__(self, ledger: Ledger, limit_bytes: int) -> None:
        self.buffer = Buffer(limit_bytes)
        self._ledger = ledger
        # With the bytes that each was submitted with.
        self._kept: deque[tuple[FrameStep, int]] = deque()
        # Those that are counted and not done, and their bytes.
        self._counted: dict[FrameStep, int] = {}

    def __bool__(self) -> bool:
        """Something is kept."""
        return bool(self._kept)

    def submitted(self, step: FrameStep) -> None:
        """A frame is on its way, some of whose rows may have to be sent again."""
        size = self._counted[step] = step.size_bytes
        self.buffer.add(size)

    def done(self, step: FrameStep) -> None:
        """Each of its rows was answered or refused."""
        size = self._counted.pop(step, None)
        if size is None:
            return
        # Without its answers, which are the application's.
        kept = step.repeat(step.applied())
        if kept is not None and self._ledger.needs(kept.rows, kept.seqs):
            self._kept.append((kept, size))
        else:
            self.buffer.remove(size)

    def release(self) -> None:
        """The store has more: lets go of the oldest frames that it has, up to the first that it lacks a row of."""
        while self._kept and not self._needed(self._kept[0][0]):
            self.buffer.remove(self._kept.popleft()[1])

    def after(self, applied: Seqs) -> Iterator[FrameStep]:
        """What servers lack which have the rows at `applied` `[n]`."""
        for step, _ in self._kept:
            repeated = step.repeat(np.flatnonzero(step.seqs > applied[step.rows]))
            if repeated is not None:
                yield repeated

    def clear(self) -> None:
        """The population has ended here."""
        self._kept.clear()
        self._counted.clear()
        self.buffer.wake()

    def _needed(self, step: FrameStep) -> bool:
        return self._ledger.needs(step.rows, step.seqs)
