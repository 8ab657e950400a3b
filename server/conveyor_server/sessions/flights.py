"""All steps in the air: which are accepted as arrays, which land, and which are late.

Invariant: a member that is accepted here is the next step of a session with nothing amiss, by the same rules as one
that comes alone (`rules`); every other member is given back, to be judged alone.
"""

from collections.abc import Callable, Iterator

import numpy as np
from conveyor_proto.reasons import Fault
from numpy.typing import NDArray

from conveyor_server.engine.batch import Batch
from conveyor_server.sessions import refusals, rules
from conveyor_server.sessions.events import Declined, Event, Landed
from conveyor_server.sessions.expiry import Deadlines
from conveyor_server.sessions.flight import Flight, Offer
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.regroup import joined, regroup
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import (
    AHEAD,
    ALOFT,
    APPLIED_SEQ,
    CREDIT,
    FAILED_SEQ,
    GATE,
    LAST_USED_AT,
    SessionTable,
)

_NOBODY = np.empty(0, np.int64)


class Flights:
    """The flights of all engines. Core thread only.

    Args:
        table: the sessions.
        limits: what the server grants.
        tell: takes what is to be told to a transport.
        watch: has a session looked at when a step of its own is late.
    """

    def __init__(
        self,
        table: SessionTable,
        limits: SessionLimits,
        *,
        tell: Callable[[Event], None],
        watch: Callable[[Session, float], None],
    ) -> None:
        self._table = table
        self._limits = limits
        self._tell = tell
        self._watch = watch
        self._deadlines = Deadlines(Flight.next_deadline)

    def offer(self, offer: Offer, now: float, *, draining: bool) -> NDArray[np.int64]:
        """See Directory.offer."""
        members: NDArray[np.int64] = np.arange(len(offer.rows))
        left = self._accept(offer, members, now, draining=draining)
        while not offer.distinct and 0 < len(left) < len(members):
            # A session's second step can be accepted once its first was.
            members = left
            left = self._accept(offer, members, now, draining=draining)
        return self._abort_behind(offer, left, now) if len(left) else left

    def _accept(self, offer: Offer, members: NDArray[np.int64], now: float, *, draining: bool) -> NDArray[np.int64]:
        """`offer` for some members, one of each session at most; returns the others."""
        table, where, seqs, holders = self._table, offer.where, offer.seqs, offer.holders
        acked_seqs = offer.acked_seqs
        if len(members) < len(offer.rows):
            where, seqs, holders = offer.rows[members], seqs[members], holders[members]
            acked_seqs = None if acked_seqs is None else acked_seqs[members]
        cells = table.look(where)
        ahead = cells[:, AHEAD]
        good = cells[:, GATE] == holders
        good &= cells[:, APPLIED_SEQ] + ahead == seqs - 1
        good &= ahead + offer.train <= cells[:, CREDIT]
        if not offer.distinct:
            # Of all that are left, not of the good ones: none overtakes what came before it.
            good &= _first_of_each(offer.rows[members])
        left: NDArray[np.int64] = _NOBODY
        if np.count_nonzero(good) < len(good):
            members, left = members[good], members[~good]
            if not len(members):
                return left
            where, seqs, cells = offer.rows[members], seqs[good], cells[good]
            acked_seqs = None if acked_seqs is None else acked_seqs[good]
        cells.view(np.float64)[:, LAST_USED_AT] = now
        if acked_seqs is not None:
            offer.record.acknowledge(cells, acked_seqs)
        turned_away, fault = self._turned_away(offer, cells, draining=draining)
        if fault is None:
            self._launch(offer, members, cells, now)
        else:
            cells[turned_away, FAILED_SEQ] = seqs[turned_away]
            table.put(where, cells)
            self._tell(Declined(offer, members[turned_away], fault))
            members, cells = members[~turned_away], cells[~turned_away]
            if len(members):
                self._launch(offer, members, cells, now)
        if acked_seqs is not None:
            offer.record.trim(where, acked_seqs)
        return left

    def _launch(self, offer: Offer, members: NDArray[np.int64], cells: NDArray[np.int64], now: float) -> None:
        flight = Flight(self._table, offer, now, now + offer.timeout_s, self._watch)
        flight.launch(members, cells)
        self._deadlines.watch(flight, flight.deadline)

    def _turned_away(
        self, offer: Offer, cells: NDArray[np.int64], *, draining: bool
    ) -> tuple[NDArray[np.bool_], Fault | None]:
        """Those of the members, whose cells they are, that the model has no room for, and why; None: it has for all."""
        fault = rules.no_capacity(offer.engine, self._limits, draining=draining)
        if fault is not None:
            return np.ones(len(cells), np.bool_), fault
        piped = cells[:, ALOFT] >= rules.PIPED
        if not np.count_nonzero(piped):
            return piped, None
        return piped, rules.no_capacity(offer.engine, self._limits, draining=False, piped=True)

    def _abort_behind(self, offer: Offer, members: NDArray[np.int64], now: float) -> NDArray[np.int64]:
        """Refuses those of the members that follow a refused step of their session; returns the others."""
        table, rows = self._table, offer.rows[members]
        failed_seqs = table.failed_seq[rows]
        behind = (failed_seqs > 0) & (offer.seqs[members] > failed_seqs) & (table.gate[rows] == offer.holders[members])
        if not offer.distinct:
            # What is to be submitted is answered after this: it must not have come before it.
            behind &= ~np.isin(rows, rows[~behind])
        if np.count_nonzero(behind):
            table.last_used_at[rows[behind]] = now
            if offer.acked_seqs is not None:
                acked_seqs = np.minimum(offer.acked_seqs[members[behind]], table.applied_seq[rows[behind]])
                # One by one: a session may be there twice.
                np.maximum.at(table.first_seq, rows[behind], acked_seqs + 1)
                offer.record.trim(rows[behind], acked_seqs)
            self._tell(Declined(offer, members[behind], refusals.aborted_behind()))
        others: NDArray[np.int64] = members[~behind]
        return others

    def land(self, batch: Batch) -> None:
        """A batch was delivered: what is left of its cohorts is applied, and what waited for them follows."""
        for cohort in batch.cohorts:
            flight = cohort.owner
            if not isinstance(flight, Flight):
                raise TypeError("a cohort that nobody offered")
            if len(cohort.members):
                flight.land(cohort)
                self._tell(Landed(flight, cohort.members, cohort.outputs))
            if not flight.waiting:
                self._deadlines.forget(flight)
        self._follow(batch)

    def late(self, now: float) -> Iterator[Session]:
        """Sessions with a step in the air that waited too long."""
        for flight in self._deadlines.due(now):
            for row in flight.rows_that_wait():
                session = self._table.sessions[row]
                if session is not None:
                    yield session

    def next_at(self) -> float:
        """Nothing is late before this time."""
        return self._deadlines.next_at()

    def _follow(self, batch: Batch) -> None:
        """Launches what was parked behind the cohorts that have landed."""
        if not self._table.parked:
            return
        ready = sum(int(np.count_nonzero(self._table.ahead[cohort.where])) for cohort in batch.cohorts)
        pieces = []
        # The oldest first: of a session that is parked in several, that one has its next step.
        for flight in list(self._table.parked.values()):
            if ready <= 0:
                break
            members = flight.free()
            if len(members):
                pieces.append((flight, members))
                self._table.flight[flight.offer.rows[members]] = flight.number
                ready -= len(members)
        for group in regroup(pieces):
            if len(group) == 1:
                flight, members = group[0]
                flight.submit(members)
                continue
            made = joined(group)
            self._deadlines.watch(made, made.deadline)
            for flight, _ in group:
                if not flight.waiting:
                    self._deadlines.forget(flight)


def _first_of_each(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where each row of the table comes for the first time."""
    chosen = np.zeros(len(rows), np.bool_)
    chosen[np.unique(rows, return_index=True)[1]] = True
    return chosen
