"""A flight: next steps of many sessions, accepted together and answered together.

Invariants: as long as all goes well, no session knows of it but by its number in the table; whoever looks closer at a
session (to refuse, repeat, cancel, close, take over) first has its rows made ordinary pending steps, and from there
every rule of `rules` holds as it stands. A member is answered once: by `landed`, or as the pending step it became. A
session may be in several flights: the engine has its step of the oldest, in the others it is parked.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from numpy.typing import NDArray

from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.engine import Engine
from conveyor_server.engine.lanes import Lane
from conveyor_server.engine.step import Step
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.session import Pending, Session
from conveyor_server.sessions.table import (
    AHEAD,
    ALOFT,
    APPLIED_SEQ,
    APPLIED_TIME_STEPS,
    FAILED_SEQ,
    FLIGHT,
    SessionTable,
)


class Sink(Protocol):
    """Where the answers of a flight go. Members are numbered as they were offered."""

    def landed(self, members: NDArray[np.int64], outputs: Sequence[Array]) -> None:
        """These members are applied.

        Outputs are `[members, time, *shape]`, or `[members, *shape]` without time, and valid until this returns.
        """

    def refused(self, members: NDArray[np.int64], fault: Fault) -> None:
        """These members are not accepted, and nothing moved."""

    def reply_to(self, member: int) -> object:
        """Who gets the answers of a member that is answered alone: the `reply_to` of its steps."""

    @property
    def kind(self) -> object:
        """Equal for sinks that can be joined."""

    def joined(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> "Sink":
        """A sink of these members of sinks of this kind, which are numbered anew, in order."""


@dataclass(slots=True, eq=False)
class Offer:
    """Steps as they arrived, valid in themselves, one or a train of them for each of several sessions.

    Attributes:
        engine, record: of all of the sessions.
        rows: int64 `[members]`, the sessions' rows in the table.
        where: the same, or the slice that they are; see Cohort.
        seqs: int64 `[members]`, of the member's first step.
        acked_seqs: int64 `[members]`, or None where the clients say nothing.
        holders: int64 `[members]`, the number of the stream that sent it.
        prints: uint64 `[members, train]`, fingerprints of the steps.
        inputs: one for each of ModelSpec.inputs: `[members, length, *shape]`, or `[members, *shape]` without time.
        length: time steps of a member.
        train: steps of a member: 1, or `length` steps of one time step each where all tensors have time.
        distinct: no session is in it twice.
        timeout_s: how long it may wait before it begins.
        sink: where answers go.
    """

    engine: Engine
    record: Record
    rows: NDArray[np.int64]
    where: "slice | NDArray[np.int64]"
    seqs: NDArray[np.int64]
    acked_seqs: NDArray[np.int64] | None
    holders: NDArray[np.int64]
    prints: NDArray[np.uint64]
    inputs: Sequence[Array]
    length: int
    train: int
    distinct: bool
    timeout_s: float
    sink: Sink


_numbers = itertools.count(1)
_NOBODY: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class Flight:
    """Members of an offer that were accepted. See engine.cohort.Owner.

    Attributes:
        table: the sessions.
        offer: what they sent.
        submitted_at, deadline: seconds of the driver's clock.
        watch: has a session looked at when a pending step of its own is too late to begin.
        number: names it in the table.
        members: int64 `[members]`, all that were accepted, ascending.
        parked: int64 `[members]`, those whose session has steps in older flights.
        cohorts: members that the engine has, as far as it was not asked for them one by one.
        waiting: members that are not answered.
    """

    table: SessionTable
    offer: Offer
    submitted_at: float
    deadline: float
    watch: Callable[[Session, float], None]
    number: int = field(default_factory=lambda: next(_numbers))
    members: NDArray[np.int64] = field(default_factory=lambda: _NOBODY)
    parked: NDArray[np.int64] = field(default_factory=lambda: _NOBODY)
    cohorts: list[Cohort] = field(default_factory=list)
    waiting: int = 0

    def launch(self, members: NDArray[np.int64], cells: NDArray[np.int64]) -> None:
        """Accepts these members: the engine has them now, or once the steps before theirs are applied.

        `cells` is what the table's `look` gave of their rows.
        """
        offer, table = self.offer, self.table
        where = offer.where if len(members) == len(offer.rows) else offer.rows[members]
        ahead = cells[:, AHEAD]
        behind = ahead > 0
        first = members
        self.members, self.waiting = members, len(members)
        if np.count_nonzero(behind):
            self.parked, first = members[behind], members[~behind]
            table.parked[self.number] = self
            cells[~behind, FLIGHT] = self.number
        else:
            cells[:, FLIGHT] = self.number
        ahead += offer.train
        cells[:, ALOFT] += 1
        cells[:, FAILED_SEQ] = 0
        table.put(where, cells)
        table.flights[self.number] = self
        offer.engine.backlog.add(offer.length // offer.train, offer.train * len(members))
        self._fly(first)

    def free(self) -> NDArray[np.int64]:
        """Takes those parked members that nothing is before any more: they are to be submitted, or handed over."""
        first = self.table.flight[self.offer.rows[self.parked]] == 0
        members: NDArray[np.int64] = self.parked[first]
        if len(members):
            self._unpark(~first)
        return members

    def submit(self, members: NDArray[np.int64]) -> None:
        """Gives the engine these members, which nothing is before."""
        self.table.flight[self.offer.rows[members]] = self.number
        self._fly(members)

    def _fly(self, members: NDArray[np.int64]) -> None:
        if not len(members):
            return
        offer = self.offer
        rows, where, inputs = offer.rows, offer.where, offer.inputs
        if len(members) < len(rows):
            rows = where = rows[members]
            inputs = [array[members] for array in inputs]
        cohort = Cohort(self, members, rows, where, inputs, offer.length, self.submitted_at, self.deadline, offer.train)
        self.cohorts.append(cohort)
        offer.engine.submit_cohort(cohort)

    def hand_over(self, members: int) -> None:
        """So many members are another flight's now."""
        self._answered(members)

    def adopt(self) -> None:
        """Takes over members that were accepted by others, all that the offer has, and gives them to the engine."""
        self.table.flights[self.number] = self
        self.members = np.arange(len(self.offer.rows))
        self.waiting = len(self.members)
        self.submit(self.members)

    def land(self, cohort: Cohort) -> None:
        """What is left of a cohort ran: the sessions have moved, and their gates open."""
        offer, table = self.offer, self.table
        members, where = cohort.members, cohort.where
        whole = len(members) == len(offer.rows)
        cells = table.look(where)
        cells[:, FLIGHT] = 0
        cells[:, AHEAD] -= offer.train
        cells[:, ALOFT] -= 1
        seqs, prints = (offer.seqs, offer.prints) if whole else (offer.seqs[members], offer.prints[members])
        apply(offer, where, cells, seqs=seqs, prints=prints, outputs=cohort.outputs)
        # What was split off is no entry of the list, and its other part still is.
        if cohort in self.cohorts:
            self.cohorts.remove(cohort)
        offer.engine.backlog.remove(offer.length // offer.train, offer.train * len(members))
        self._answered(len(members))

    def next_deadline(self) -> float:
        """When its steps are too late to begin; infinity once all have begun."""
        return self.deadline if self.rows_that_wait() else math.inf

    def rows_that_wait(self) -> list[int]:
        """Rows of the table whose step is in no run yet."""
        if not self.waiting:
            return []
        rows: list[int] = self.offer.rows[self.parked].tolist()
        for cohort in self.cohorts:
            if not cohort.running:
                cohort.compact()
                rows += [row for row in cohort.lanes.tolist() if self.table.flight[row] == self.number]
        return rows

    def come_down(self, row: int) -> None:
        """Makes the steps of the session in that row of the table pending ones of its own, those of later flights too.

        The engine must have this flight's.
        """
        member = self._member(row)
        cohort = next((cohort for cohort in self.cohorts if member in cohort.members), self.cohorts[0])
        self.offer.engine.detach(cohort, member)

    def claim(self, member: int, *, running: bool) -> Step:
        """Makes a member's steps pending ones; the engine gets the first, or all of them together where they run.

        What its session has in later flights follows them.
        """
        offer, table = self.offer, self.table
        row = int(offer.rows[member])
        table.flight[row] = table.gate[row] = 0
        steps = self._pend(member)
        table.ahead[row] -= offer.train
        table.aloft[row] = 0
        if table.ahead[row]:
            for later in list(table.parked.values()):
                later.join(row)
        if not running or offer.train == 1:
            return steps[0]
        for step in steps:
            step.running = True
        inputs = [array[member] for array in offer.inputs]
        whole = Step(steps[0].lane, inputs, offer.length, steps[0].context, self.submitted_at, self.deadline)
        whole.train = offer.train
        return whole

    def join(self, row: int) -> None:
        """Makes the parked steps of the session in that row, if there are any, pending ones behind those it has."""
        here = self.offer.rows[self.parked] == row
        if here.any():
            member = int(self.parked[here][0])
            self._unpark(~here)
            self._pend(member)
            self.table.ahead[row] -= self.offer.train

    def _unpark(self, stay: NDArray[np.bool_]) -> None:
        self.parked = self.parked[stay]
        if not len(self.parked):
            del self.table.parked[self.number]

    def _member(self, row: int) -> int:
        """The member whose session is in that row. A session that an offer names twice is in several flights of it."""
        return int(self.members[self.offer.rows[self.members] == row][0])

    def _pend(self, member: int) -> list[Step]:
        """Appends a member's steps to its session's pending ones, a train's apart from each other."""
        offer, row = self.offer, int(self.offer.rows[member])
        session = self._session(row)
        lane = Lane(offer.engine.lanes, row)
        inputs = [array[member] for array in offer.inputs]
        steps = [Step(lane, inputs, offer.length, session, self.submitted_at, self.deadline)]
        if offer.train > 1:
            parts = [[array[turn : turn + 1] for array in inputs] for turn in range(offer.train)]
            steps = [Step(lane, part, 1, session, self.submitted_at, self.deadline) for part in parts]
        reply_to = offer.sink.reply_to(member)
        for turn, step in enumerate(steps):
            seq, fingerprint = int(offer.seqs[member]) + turn, int(offer.prints[member, turn])
            session.own_pending.append(Pending(seq, fingerprint, step, [reply_to]))
        self.watch(session, self.deadline)
        self._answered(1)
        return steps

    def _session(self, row: int) -> Session:
        session = self.table.sessions[row]
        if session is None:
            raise AssertionError("a session in the air is gone")
        return session

    def _answered(self, members: int) -> None:
        self.waiting -= members
        if not self.waiting:
            del self.table.flights[self.number]


def apply(
    offer: Offer,
    where: "slice | NDArray[np.int64]",
    cells: NDArray[np.int64],
    *,
    seqs: NDArray[np.int64],
    prints: NDArray[np.uint64],
    outputs: Sequence[Array],
) -> None:
    """Members of an offer ran: their sessions have moved, and keep the answers.

    Args:
        offer: what was offered.
        where: rows of the members' sessions.
        cells: what `look` gave of them; they are `put` here.
        seqs: of the members, as of Offer.
        prints: of the members, as of Offer.
        outputs: of the members, as of Sink.landed.
    """
    record, train = offer.record, offer.train
    if offer.length == train:
        for turn in range(train):
            parts = outputs if train == 1 else [array[:, turn : turn + 1] for array in outputs]
            record.add(where, cells, seqs + turn if turn else seqs, prints[:, turn], parts)
    cells[:, APPLIED_SEQ] = seqs + (train - 1) if train > 1 else seqs
    cells[:, APPLIED_TIME_STEPS] += offer.length
    record.table.put(where, cells)
    if offer.length == train:
        record.trim(where)
    else:
        record.keep(where, seqs, prints[:, 0], offer.length, outputs)
