"""A population's flushes: which rows the server should store now, and who waits for it.

Invariant: a row is asked for once until the server has answered; whoever waits is told when every row is there or gone.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from conveyor._core.frame import Seqs
from conveyor._core.frames import Frames
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError


class Flushes:
    """One population's."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._ledger = frames.ledger
        rows = len(frames.every_row)
        # What the store should have soon.
        self._wanted: Seqs = np.zeros(rows, np.uint64)
        self._some_wanted = False
        # Rows that the server was asked for and has not answered.
        self._asked = np.zeros(rows, np.bool_)
        self._waiting: list[tuple[Seqs, Ticket[Seqs]]] = []

    @property
    def waited_for(self) -> bool:
        """Somebody waits for the store."""
        return bool(self._waiting) or self._frames.kept.buffer.waited_for

    def ask(self) -> Ticket[Seqs]:
        """Settled with `[n]` durable seqs once the store has what is answered now."""
        ticket: Ticket[Seqs] = Ticket()
        target = self._ledger.acked.copy()
        self._waiting.append((target, ticket))
        self._wanted = np.maximum(self._wanted, target)
        self._some_wanted = True
        self.check()
        return ticket

    def secure(self, row: int, seq: int) -> None:
        """A row's step should be in the store soon: it was another client's, and is not here to be sent again."""
        self._wanted[row] = seq
        self._some_wanted = True

    def take(self) -> Sequence[int]:
        """Rows that the server is to be asked for now, and counts as asked from here on."""
        half_full = self._frames.kept and self._frames.kept.buffer.half_full
        if not self._some_wanted and not half_full:
            return ()
        ledger = self._ledger
        behind = ledger.stored & (ledger.durable < self._wanted)
        self._some_wanted = bool(behind.any())
        if half_full:
            behind |= ~ledger.exempt & (ledger.durable < ledger.acked)
        behind &= ~self._asked
        behind[list(self._frames.row_errors)] = False
        self._asked |= behind
        rows: list[int] = np.flatnonzero(behind).tolist()
        return rows

    def answered(self, rows: NDArray[np.intp]) -> None:
        """The server has answered for these rows, or refused to."""
        self._asked[rows] = False

    def begin(self) -> None:
        """A new stream was asked for nothing."""
        self._asked[:] = False

    def check(self) -> None:
        """Tells whoever waits for what is there."""
        for waiting in list(self._waiting):
            target, ticket = waiting
            there = self._ledger.durable >= target
            there[list(self._frames.row_errors)] = True
            if there.all():
                self._waiting.remove(waiting)
                ticket.resolve(self._ledger.durable.copy())

    def refuse(self, error: ConveyorError) -> None:
        """The store did not catch up in time, or has no part in this."""
        self._wanted[:] = 0
        self._some_wanted = False
        waiting, self._waiting = self._waiting, []
        for _, ticket in waiting:
            ticket.fail(error)
