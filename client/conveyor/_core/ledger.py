"""What a population knows of each row's numbering, in arrays: one entry per row, one numpy call for all.

Invariant: `in_flight` counts the row's steps that were submitted and neither answered nor refused.
"""

import numpy as np
from numpy.typing import NDArray

from conveyor._core.frame import Seqs

# Rows by their indices; or all of them, which costs no picking.
Picked = NDArray[np.intp] | slice
ALL = slice(None)


class Ledger:
    """One population's numbers.

    Attributes:
        next_seqs: `[n]` uint64, the number that the row's next step gets.
        acked: `[n]` uint64, the row's last step that was answered.
        in_flight: `[n]` int64.
        credits: `[n]` int64, how many may be.
        blocked: `[n]` bool, rows that were refused a step and whose later steps still await their own refusal.
        resend_from: `[n]` uint64, the first step that this stream refused and the next one shall take; 0: none.
    """

    def __init__(self, rows: int) -> None:
        self.next_seqs: Seqs = np.ones(rows, np.uint64)
        self.acked: Seqs = np.zeros(rows, np.uint64)
        self.in_flight = np.zeros(rows, np.int64)
        self.credits = np.ones(rows, np.int64)
        self.blocked = np.zeros(rows, np.bool_)
        self.resend_from: Seqs = np.zeros(rows, np.uint64)
        self._some_blocked = False

    def granted(self, row: int, credit: int) -> None:
        """The row was attached and may have so many steps in flight."""
        self.credits[row] = max(1, credit)

    def begin(self, row: int, applied: int) -> None:
        """The row was attached for the first time, at that step."""
        self.next_seqs[row] = applied + 1
        self.acked[row] = applied

    def may_submit(self, rows: Picked) -> bool:
        """Every one of the rows may take one more step."""
        if self._some_blocked and self.blocked[rows].any():
            return False
        return bool((self.in_flight[rows] < self.credits[rows]).all())

    def submit(self, rows: Picked) -> Seqs:
        """Numbers one more step of each row: `[k]` uint64."""
        seqs = self.next_seqs[rows].copy()
        self.next_seqs[rows] += np.uint64(1)
        self.in_flight[rows] += 1
        return seqs

    def unsubmit(self, row: int) -> None:
        """The row's session is gone, and the step that was numbered is never sent."""
        self.next_seqs[row] -= np.uint64(1)

    def answered(self, rows: Picked, seqs: Seqs) -> None:
        """Those steps were answered."""
        self.acked[rows] = np.maximum(self.acked[rows], seqs)
        self.settled(rows)

    def settled(self, rows: Picked) -> None:
        """A step of each row was answered or refused."""
        self.in_flight[rows] -= 1
        if self._some_blocked:
            self.blocked &= self.in_flight > 0
            self._some_blocked = bool(self.blocked.any())

    def skipped(self, row: int, seq: int) -> None:
        """The step was applied and its answer is lost."""
        self.acked[row] = max(int(self.acked[row]), seq)

    def refused(self, row: int, seq: int) -> None:
        """The step was not applied, and those after it will not be: the row's next one takes its number."""
        self.next_seqs[row] = min(int(self.next_seqs[row]), seq)
        self.blocked[row] = self._some_blocked = True
