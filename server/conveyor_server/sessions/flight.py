"""A flight: next steps of many sessions, accepted together and answered together.

Invariants: as long as all goes well, no session knows of it but by its number in the table; whoever looks closer at a
session (to refuse, repeat, cancel, close, take over) first has its row made an ordinary pending step, and from there
every rule of `rules` holds as it stands. A member is answered once: by `landed`, or as the pending step it became.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from numpy.typing import NDArray

from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.engine import Engine
from conveyor_server.engine.lanes import Lane
from conveyor_server.engine.step import Step
from conveyor_server.sessions.record import Record, Recorded
from conveyor_server.sessions.session import Pending, Session
from conveyor_server.sessions.table import SessionTable


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


@dataclass(slots=True, eq=False)
class Flight:
    """Members of an offer that were accepted. See engine.cohort.Owner.

    Attributes:
        table: the sessions.
        offer: what they sent.
        submitted_at, deadline: seconds of the driver's clock.
        number: names it in the table.
        waiting: members that are not answered.
    """

    table: SessionTable
    offer: Offer
    submitted_at: float
    deadline: float
    number: int = field(default_factory=lambda: next(_numbers))
    waiting: int = 0
    cohort: Cohort = field(init=False)

    def launch(self, members: NDArray[np.int64]) -> None:
        """Takes these members off: their gates close, and the engine has them."""
        offer, table = self.offer, self.table
        whole = len(members) == len(offer.rows)
        rows = offer.rows if whole else offer.rows[members]
        where = offer.where if whole else rows
        table.flight[where] = self.number
        table.gate[where] = 0
        table.failed_seq[where] = 0
        table.flights[self.number] = self
        self.waiting = len(members)
        inputs = offer.inputs if whole else [array[members] for array in offer.inputs]
        self.cohort = Cohort(
            self, members, rows, where, inputs, offer.length, self.submitted_at, self.deadline, offer.train
        )
        offer.engine.backlog_time_steps += offer.length * len(members)
        offer.engine.submit_cohort(self.cohort)

    def land(self, cohort: Cohort) -> None:
        """What is left of a cohort ran: the sessions have moved, and their gates open."""
        offer, table = self.offer, self.table
        members, where = cohort.members, cohort.where
        whole = len(members) == len(offer.rows)
        seqs = offer.seqs if whole else offer.seqs[members]
        prints = offer.prints if whole else offer.prints[members]
        self._record(cohort, seqs, prints)
        table.applied_seq[where] = seqs + (offer.train - 1)
        table.applied_time_steps[where] += offer.length
        table.flight[where] = 0
        table.gate[where] = offer.holders if whole else offer.holders[members]
        offer.engine.backlog_time_steps -= offer.length * len(members)
        self._answered(len(members))

    def next_deadline(self) -> float:
        """When its steps are too late to begin; infinity once all have begun."""
        return self.deadline if self.rows_that_wait() else math.inf

    def rows_that_wait(self) -> list[int]:
        """Rows of the table whose step is in no run yet."""
        cohort = self.cohort
        if cohort.running or not self.waiting:
            return []
        cohort.compact()
        return [int(row) for row in cohort.lanes if self.table.flight[row] == self.number]

    def come_down(self, row: int) -> None:
        """Makes the steps of the session in that row of the table pending ones of its own."""
        self.offer.engine.detach(self.cohort, int(np.flatnonzero(self.offer.rows == row)[0]))

    def claim(self, member: int, *, running: bool) -> Step:
        """Makes a member's steps pending ones; the engine gets the first, or all of them together where they run."""
        offer = self.offer
        row = int(offer.rows[member])
        session = self._session(row)
        self.table.flight[row] = 0
        lane = Lane(offer.engine.lanes, row)
        inputs = [array[member] for array in offer.inputs]
        whole = Step(lane, inputs, offer.length, session, self.submitted_at, self.deadline)
        steps = [whole]
        if offer.train > 1:
            parts = [[array[turn : turn + 1] for array in inputs] for turn in range(offer.train)]
            steps = [Step(lane, part, 1, session, self.submitted_at, self.deadline) for part in parts]
        reply_to = offer.sink.reply_to(member)
        for turn, step in enumerate(steps):
            seq, fingerprint = int(offer.seqs[member]) + turn, int(offer.prints[member, turn])
            session.own_pending.append(Pending(seq, fingerprint, step, [reply_to]))
        self._answered(1)
        if not running or offer.train == 1:
            return steps[0]
        for step in steps:
            step.running = True
        whole.train = offer.train
        return whole

    def _record(self, cohort: Cohort, seqs: NDArray[np.int64], prints: NDArray[np.uint64]) -> None:
        offer, rows, outputs = self.offer, cohort.lanes, cohort.outputs
        if offer.length == offer.train:
            for turn in range(offer.train):
                parts = outputs if offer.train == 1 else [array[:, turn : turn + 1] for array in outputs]
                offer.record.add(cohort.where, seqs + turn, prints[:, turn], parts)
            kept = self.table.kept[cohort.where]
            if kept.any():
                for row in rows[kept].tolist():
                    self._session(row).answers.trim()
            return
        for index, row in enumerate(rows.tolist()):
            # Copies: what is kept for replay must not keep the whole run's outputs.
            own = [array[index].copy() for array in outputs]
            answer = Recorded(int(seqs[index]), int(prints[index, 0]), offer.length, own)
            self._session(row).answers.add(answer)

    def _session(self, row: int) -> Session:
        session = self.table.sessions[row]
        if session is None:
            raise AssertionError("a session in the air is gone")
        return session

    def _answered(self, members: int) -> None:
        self.waiting -= members
        if not self.waiting:
            del self.table.flights[self.number]
