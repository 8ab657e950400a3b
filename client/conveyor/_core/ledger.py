"""What a population knows of each row's numbering, in arrays: one entry per row, one numpy call for all.

Invariant: a row's steps that were submitted and neither answered nor refused are counted, and never exceed its credit.
"""

import numpy as np
from numpy.typing import NDArray

from conveyor._core.frame import Seqs

# Rows by their indices; or all of them, in their order: the slice, which costs no picking.
Picked = NDArray[np.intp] | slice
ALL = slice(None)
_ONE = np.uint64(1)


class Ledger:
    """One population's numbers.

    Attributes:
        next_seqs: `[n]` uint64, the number that the row's next step gets.
        acked: `[n]` uint64, the row's last step that was answered.
        credits: `[n]` int64, how many of its steps may be in flight.
        blocked: `[n]` bool, rows that were refused a step and whose later steps still await their own refusal.
        resend_from: `[n]` uint64, the first step that this stream refused and the next one shall take; 0: none.
    """

    def __init__(self, rows: int) -> None:
        self.next_seqs: Seqs = np.ones(rows, np.uint64)
        self.acked: Seqs = np.zeros(rows, np.uint64)
        # A row's count is the sum of the two: steps of all rows are counted once.
        self._in_flight = np.zeros(rows, np.int64)
        self._all_in_flight = 0
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
        return bool((self._in_flight[rows] + self._all_in_flight < self.credits[rows]).all())

    def submit(self, rows: Picked) -> Seqs:
        """Numbers one more step of each row: `[k]` uint64, which nobody changes."""
        if isinstance(rows, slice):
            # What was the next is handed out, and never written to again.
            seqs, self.next_seqs = self.next_seqs, self.next_seqs + _ONE
            self._all_in_flight += 1
            return seqs
        seqs = self.next_seqs[rows]
        self.next_seqs[rows] += _ONE
        self._in_flight[rows] += 1
        return seqs

    def unsubmit(self, row: int) -> None:
        """The row's session is gone, and the step that was numbered is never sent."""
        self.next_seqs[row] -= _ONE

    def answered(self, rows: Picked, seqs: Seqs) -> None:
        """Those steps were answered."""
        if isinstance(rows, slice):
            np.maximum(self.acked, seqs, out=self.acked)
        else:
            self.acked[rows] = np.maximum(self.acked[rows], seqs)
        self.settled(rows)

    def settled(self, rows: Picked) -> None:
        """A step of each row was answered or refused."""
        if isinstance(rows, slice):
            self._all_in_flight -= 1
        else:
            self._in_flight[rows] -= 1
        if self._some_blocked:
            self.blocked &= self._in_flight + self._all_in_flight > 0
            self._some_blocked = bool(self.blocked.any())

    def skipped(self, row: int, seq: int) -> None:
        """The step was applied and its answer is lost."""
        self.acked[row] = max(int(self.acked[row]), seq)

    def refused(self, row: int, seq: int) -> None:
        """The step was not applied, and those after it will not be: the row's next one takes its number."""
        self.next_seqs[row] = min(int(self.next_seqs[row]), seq)
        self.blocked[row] = self._some_blocked = True
