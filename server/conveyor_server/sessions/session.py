"""One session: its place in an engine, its numbering and what it has accepted.

Invariants: accepted_seq == applied_seq + len(pending); only pending[0] is in the engine (a train that runs is there as
a whole, and counts as its head); failed_seq is 0 or the next seq that can be accepted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.engine.lanes import Lane
from conveyor_server.engine.step import Step
from conveyor_server.identity.caller import public_name
from conveyor_server.sessions.answers import NO_ANSWERS, Answers
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.table import SessionTable

DetachCause: TypeAlias = session_pb2.DetachCause.ValueType
Durability: TypeAlias = session_pb2.Durability.ValueType

if TYPE_CHECKING:
    from conveyor_server.sessions.events import Attachment


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session was granted.

    Attributes:
        max_in_flight: credit: steps that may be unanswered at once.
        idle_timeout_s: without a step, attach or detach for this long, the session is closed.
        durability: what outlives the process.
        tenant: whose it is; "": nobody's.
    """

    max_in_flight: int
    idle_timeout_s: float
    durability: Durability = session_pb2.DURABILITY_NONE
    tenant: str = ""


@dataclass(slots=True)
class Submission:
    """A step as it arrived, decoded.

    Attributes:
        seq: the client's number.
        reply_to: opaque; comes back in the Answer.
        inputs: one for each of ModelSpec.inputs: `[time, *shape]`, or `[*shape]` without time.
        length: time steps, at least 1.
        fingerprint: of the content; equal content has equal fingerprints.
        fault: why the content cannot be used; the other three are then unset.
        epoch: 0, or the epoch that the sender believes it holds.
        timeout_s: how long it may wait before it begins.
        acked_seq: answers up to here are held by the client.
    """

    seq: int
    reply_to: object
    inputs: Sequence[Array] = ()
    length: int = 0
    fingerprint: int = 0
    fault: Fault | None = None
    epoch: int = 0
    timeout_s: float = math.inf
    acked_seq: int = 0


@dataclass(slots=True, eq=False)
class Pending:
    """An accepted step that is not answered yet.

    Attributes:
        waiters: every `reply_to` that gets the answer, the first sender first.
    """

    seq: int
    fingerprint: int
    step: Step
    waiters: list[object]


class Session:
    """A session's record. Core thread only.

    What every step asks of it lies in the session table; what few sessions have (pending steps of its own, answers
    longer than a token) is made when it is needed: an idle session costs little beside its state and its last answer.

    Args:
        session_id: its full name, see identity.caller.
        engine: of its model version.
        record: of that engine; its table gives a row to this session.
        options: what it was granted.
        now: seconds of the driver's clock.

    Attributes:
        epoch: of the last attach.
        attachment: the stream that holds it.
        closing: why it goes once the accepted steps are answered; no further step is accepted.
        ring: answers that its Record does not hold, see Answers.
        stored: a record of it is in the store, and is this server's to write.
        slept_seq: the step that it was at when it left memory for the store, where it is now; -1: it is here.
    """

    __slots__ = (
        *("_pending", "attachment", "closing", "engine", "epoch", "id", "record", "ring", "row", "slept_seq"),
        *("stored", "table"),
    )

    def __init__(self, session_id: str, engine: Engine, record: Record, options: SessionOptions, now: float) -> None:
        self.id = session_id
        self.engine = engine
        self.record = record
        self.table = record.table
        self.row = self.table.rows.acquire()
        self.epoch = 0
        self.attachment: Attachment | None = None
        self.closing: DetachCause | None = None
        self.ring = NO_ANSWERS
        self.stored = False
        self.slept_seq = -1
        self._pending = _NOTHING
        self.table.add(self, options, now)
        self.table.record[self.row] = record.number

    @property
    def name(self) -> str:
        """What its tenant calls it."""
        return public_name(self.id)

    @property
    def options(self) -> SessionOptions:
        """What it was granted."""
        table, row = self.table, self.row
        tenant = table.tenants.get(row, "")
        return SessionOptions(int(table.credit[row]), float(table.idle_timeout_s[row]), self.durability, tenant)

    @property
    def paused(self) -> bool:
        """Its steps wait, whatever the engine has to do: the store is to have something first."""
        return self.row in self.table.paused

    @property
    def durability(self) -> Durability:
        """What outlives the process."""
        return cast("Durability", int(self.table.durability[self.row]))

    @property
    def asleep(self) -> bool:
        """Its state is in the store alone, while a stream holds it."""
        return self.slept_seq >= 0

    @property
    def durable_seq(self) -> int:
        """The last step whose state is in the store."""
        return int(self.table.durable_seq[self.row]) if self.slept_seq < 0 else self.slept_seq

    @property
    def applied_seq(self) -> int:
        """The last seq that was applied."""
        return int(self.table.applied_seq[self.row]) if self.slept_seq < 0 else self.slept_seq

    @applied_seq.setter
    def applied_seq(self, seq: int) -> None:
        self.table.applied_seq[self.row] = seq

    @property
    def applied_time_steps(self) -> int:
        """Time steps of all steps that were applied."""
        return int(self.table.applied_time_steps[self.row])

    @applied_time_steps.setter
    def applied_time_steps(self, time_steps: int) -> None:
        self.table.applied_time_steps[self.row] = time_steps

    @property
    def failed_seq(self) -> int:
        """The step that failed and was not sent again; 0: none."""
        return int(self.table.failed_seq[self.row])

    @failed_seq.setter
    def failed_seq(self, seq: int) -> None:
        self.table.failed_seq[self.row] = seq

    @property
    def created_at(self) -> float:
        """In seconds of the driver's clock."""
        return float(self.table.created_at[self.row])

    @property
    def last_used_at(self) -> float:
        """The last step, attach or detach, in seconds of the driver's clock."""
        return float(self.table.last_used_at[self.row])

    @last_used_at.setter
    def last_used_at(self, at: float) -> None:
        self.table.last_used_at[self.row] = at

    @property
    def lane(self) -> Lane:
        """Where its committed state is."""
        return Lane(self.engine.lanes, self.row)

    @property
    def answers(self) -> Answers:
        """Its last answers."""
        return Answers(self)

    @property
    def pending(self) -> deque[Pending]:
        """The steps that are accepted and not applied, in order. Steps in the air come down by being looked at."""
        number = int(self.table.flight[self.row])
        if number:
            self.table.flights[number].come_down(self.row)
        return self._pending

    @property
    def steps_ahead(self) -> int:
        """How many steps are accepted and not applied. What is in the air stays there."""
        return len(self._pending) + int(self.table.ahead[self.row])

    @property
    def own_pending(self) -> deque[Pending]:
        """`pending` to add to; what is in the air stays there."""
        if self._pending is _NOTHING:
            self._pending = deque()
        return self._pending

    @property
    def accepted_seq(self) -> int:
        """The last seq that was accepted."""
        return self.applied_seq + len(self.pending)

    def retire(self) -> None:
        """The session is gone, and its row is free for another."""
        if self.slept_seq < 0:
            self.table.remove(self.row)
        self.table, self.row = _GONE, 0

    def sleep(self) -> None:
        """The session's state is in the store, all of it, and its row is free for another."""
        seq = self.applied_seq
        self.retire()
        self.slept_seq = seq
        self.ring = NO_ANSWERS

    def wake(self, record: Record, options: SessionOptions, now: float) -> None:
        """Gives it a row again, as a fresh session's."""
        self.slept_seq = -1
        self.record = record
        self.table = record.table
        self.row = self.table.rows.acquire()
        self.table.add(self, options, now)
        self.table.record[self.row] = record.number

    def regate(self) -> None:
        """Opens the gate for the stream that holds the session, if nothing but flights is under way; else closes it."""
        if not self._pending:
            self._pending = _NOTHING
        held, table, row = self.attachment, self.table, self.row
        if (
            held is None
            or held.detaching
            or self.closing is not None
            or row in table.paused
            or self._pending
            or table.durability[row] >= table.suspended_from
        ):
            table.gate[row] = 0
        else:
            table.gate[row] = held.number


# Where the sessions that are gone find nothing.
_GONE = SessionTable(1)
# Shared by all sessions that have none: an empty deque takes 700 bytes.
_NOTHING: deque[Pending] = deque(maxlen=0)
