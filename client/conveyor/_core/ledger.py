"""What a population knows of each row's numbering, in arrays: one entry per row, one numpy call for all.

Invariant: a row's steps that were submitted and neither answered nor refused are counted, and never exceed its credit.
"""

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.frame import Seqs

# Rows by their indices; or all of them, in their order: the slice, which costs no picking.
Picked = NDArray[np.intp] | slice
ALL = slice(None)
_ONE = np.uint64(1)
_STORED = frozenset({pb.DURABILITY_ASYNC, pb.DURABILITY_SYNC})


class Ledger:
    """One population's numbers.

    Attributes:
        next_seqs: `[n]` uint64, the number that the row's next step gets.
        acked: `[n]` uint64, the row's last step that was answered, as all before it were.
        credits: `[n]` int64, how many of its steps may be in flight.
        blocked: `[n]` bool, rows that were refused a step and whose later steps still await their own refusal.
        resend_from: `[n]` uint64, the first step that this stream refused and that shall be sent again; 0: none.
        durable: `[n]` uint64, the row's last step that is in the server's store, as far as was heard; 0 without one.
        stored: `[n]` bool, rows that are kept in a store.
        exempt: `[n]` bool, rows whose answered steps need not be kept: answers leave after they are stored, or nothing
            is, or the row is gone.
        stores: some row is stored.
        keeps: some row is not exempt.
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
        # Steps that were answered although one before them was not: that one was refused for now.
        self._ahead: dict[int, set[int]] = {}
        self.durable: Seqs = np.zeros(rows, np.uint64)
        self.stored = np.zeros(rows, np.bool_)
        self.exempt = np.ones(rows, np.bool_)
        self.stores = self.keeps = False
        # Where a row was when its steps began to be kept.
        self._kept_since: Seqs = np.zeros(rows, np.uint64)

    def granted(self, row: int, info: pb.SessionInfo) -> None:
        """The row was attached."""
        self.credits[row] = max(1, info.max_in_flight)
        if info.durability == pb.DURABILITY_ASYNC and self.exempt[row]:
            self.exempt[row], self.keeps = False, True
            self._kept_since[row] = self.acked[row]
        if info.durability in _STORED:
            self.stored[row] = self.stores = True
            self.durable[row] = max(int(self.durable[row]), info.durable_seq)

    def begin(self, row: int, applied: int) -> None:
        """The row was attached for the first time, at that step."""
        self.next_seqs[row] = applied + 1
        self.acked[row] = applied

    def lost(self, row: int) -> None:
        """The row's session is gone."""
        self.exempt[row] = True
        self.keeps = not self.exempt.all()

    def kept_from(self, row: int) -> int:
        """The row's first answered step that is kept; the one behind all, where none is."""
        answered = int(self.acked[row])
        if self.exempt[row]:
            return answered + 1
        return min(answered, max(int(self.durable[row]), int(self._kept_since[row]))) + 1

    def moved(self, rows: Picked, seqs: Seqs) -> None:
        """The store has the rows' steps up to these; a row that is named twice has the later one last."""
        self.durable[rows] = np.maximum(self.durable[rows], seqs)

    def needs(self, rows: NDArray[np.intp], seqs: Seqs) -> bool:
        """Some of these steps may have to be sent again."""
        if self.durable[rows[0]] < seqs[0] and not self.exempt[rows[0]]:
            # What nearly always is so, of the steps that are asked about.
            return True
        return bool(((self.durable[rows] < seqs) & ~self.exempt[rows]).any())

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
        if not self._ahead and bool((self.acked[rows] + _ONE == seqs).all()):
            self.acked[rows] = seqs
        else:
            numbers = np.arange(len(self.acked)) if isinstance(rows, slice) else rows
            for row, seq in zip(numbers.tolist(), seqs.tolist(), strict=True):
                self.skipped(row, seq)
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
        """The step was answered, or was applied and its answer is lost."""
        if seq <= self.acked[row]:
            return
        ahead = self._ahead.setdefault(row, set())
        ahead.add(seq)
        while (following := int(self.acked[row]) + 1) in ahead:
            ahead.remove(following)
            self.acked[row] = following
        if not ahead:
            del self._ahead[row]

    def refused(self, row: int, seq: int) -> None:
        """The step was not applied, and those after it will not be: the row's next one takes its number."""
        self.next_seqs[row] = min(int(self.next_seqs[row]), seq)
        self.blocked[row] = self._some_blocked = True
