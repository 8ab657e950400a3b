"""The session directory: who lives here, who holds whom, and who is gone and why.

Invariant: a session that is not here is refused with the reason; it is never silently begun again from zeros.
Everything here is synchronous, takes the time as an argument, and runs on the core thread. Effects that must reach
a client are events, taken with `take_events` after each call.
"""

import itertools
import math
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.runner.base import RunFailed, RunResult
from conveyor_server.sessions import express, rules
from conveyor_server.sessions.departed import Departed
from conveyor_server.sessions.events import Attachment, Closed, Detached, Event
from conveyor_server.sessions.expiry import Deadlines
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.flights import Flights
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.session import DetachCause, Session, SessionOptions, Submission
from conveyor_server.sessions.table import SessionTable

if TYPE_CHECKING:
    from conveyor_server.compiled import Staging, Turn

SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# How long a look for idle sessions is put off for each row of the table.
_LOOK_S = 1e-6


class Directory:
    """All sessions of a server. Core thread only."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self.draining = False
        self.sessions: dict[str, Session] = {}
        self.table = SessionTable(limits.max_sessions)
        self.opened = 0
        self.closed: Counter[str] = Counter()
        self._departed = Departed(limits.remembered)
        self._records: dict[Engine, Record] = {}
        # Numbers are never used again: a row of the table may still name the record of an engine that is gone.
        self._record_numbers = itertools.count(1)
        self._idle_at = math.inf
        self._late = Deadlines(rules.first_deadline)
        self._events: list[Event] = []
        self._flights = Flights(self.table, limits, tell=self._tell, watch=self._late.watch)

    # ------------------------------------------------------------ life

    def lookup(self, session_id: str) -> Session:
        """The live session of that id.

        Raises:
            Refused: SESSION_NOT_FOUND, or SESSION_EXPIRED or SESSION_CLOSED while that is remembered.
        """
        session = self.sessions.get(session_id)
        if session is not None:
            if session.closing is not None:
                raise Refused(rules.closing(session))
            return session
        raise Refused(self._departed.why(session_id))

    def admit(self, sessions: int = 1) -> None:
        """Returns where so many more sessions can be created.

        Args:
            sessions: how many; 0: it is asked only whether the server takes anything new.

        Raises:
            Refused: DRAINING or SESSIONS_EXHAUSTED.
        """
        limits = self.limits
        if self.draining:
            raise Refused(rules.stopping(limits.retry_s))
        if sessions and len(self.sessions) + sessions > limits.max_sessions:
            raise refuse(
                e.ERROR_REASON_SESSIONS_EXHAUSTED,
                f"all {limits.max_sessions} sessions are taken: close some, wait until idle ones expire, or raise "
                "--max-sessions",
                retry_s=limits.retry_s,
                max_sessions=str(limits.max_sessions),
            )

    def create(
        self, engine: Engine, now: float, *, session_id: str = "", max_in_flight: int = 0, idle_timeout_s: float = 0.0
    ) -> Session:
        """A fresh session; zeros take the server's defaults, and what exceeds its limits is lowered to them.

        Raises:
            Refused: DRAINING, SESSIONS_EXHAUSTED, SESSION_EXISTS or SESSION_ID_INVALID.
        """
        limits = self.limits
        self.admit()
        session_id = session_id or secrets.token_hex(12)
        if not SESSION_ID.fullmatch(session_id):
            raise refuse(
                e.ERROR_REASON_SESSION_ID_INVALID,
                "a session id is 1 to 128 letters, digits, '.', '_', ':' or '-'; leave it empty to be given one",
                session_id=session_id[:128],
            )
        if session_id in self.sessions:
            raise refuse(
                e.ERROR_REASON_SESSION_EXISTS,
                f"session {session_id!r} exists: resume it, or choose another id",
                session_id=session_id,
            )
        credit = min(max_in_flight or limits.default_in_flight, limits.max_in_flight)
        timeout_s = min(idle_timeout_s or limits.default_idle_timeout_s, limits.max_idle_timeout_s)
        session = Session(session_id, engine, self._record(engine), SessionOptions(credit, timeout_s), now)
        self.sessions[session_id] = session
        self._departed.forget(session_id)
        self._idle_at = min(self._idle_at, now + timeout_s)
        self.opened += 1
        return session

    def fork(
        self,
        parent: Session,
        now: float,
        *,
        session_id: str = "",
        max_in_flight: int = 0,
        idle_timeout_s: float = 0.0,
    ) -> Session:
        """A new session with the parent's committed state and applied_seq. Unset options are the parent's.

        Raises:
            Refused: as `create`.
        """
        states = parent.engine.read(parent.lane)
        return self.restore(
            parent.engine,
            states,
            now,
            applied_seq=parent.applied_seq,
            applied_time_steps=parent.applied_time_steps,
            session_id=session_id,
            max_in_flight=max_in_flight or parent.options.max_in_flight,
            idle_timeout_s=idle_timeout_s or parent.options.idle_timeout_s,
        )

    def restore(
        self,
        engine: Engine,
        states: Sequence[Array] | None,
        now: float,
        *,
        applied_seq: int,
        applied_time_steps: int,
        session_id: str = "",
        max_in_flight: int = 0,
        idle_timeout_s: float = 0.0,
    ) -> Session:
        """A session that goes on from `states`, one `[*shape]` array for each of ModelSpec.states; None: fresh.

        Raises:
            Refused: as `create`.
        """
        session = self.create(
            engine, now, session_id=session_id, max_in_flight=max_in_flight, idle_timeout_s=idle_timeout_s
        )
        if states is not None:
            engine.write(session.lane, states)
        session.applied_seq = applied_seq
        session.applied_time_steps = applied_time_steps
        return session

    def close(self, session: Session, reply_to: object, now: float) -> None:
        """Closes once the accepted steps are answered; then come Detached (if attached) and Closed events."""
        session.last_used_at = now
        session.closing = session_pb2.DETACH_CAUSE_CLOSED
        session.close_waiters = [*session.close_waiters, reply_to]
        self._settle(session)

    def close_all(self, engine: Engine, cause: DetachCause, now: float) -> int:
        """Closes all sessions of an engine that no longer takes part; steps not yet running are aborted.

        A session whose step is running goes when that is delivered. Returns how many there were.
        """
        sessions = [session for session in self.sessions.values() if session.engine is engine]
        for session in sessions:
            session.last_used_at = now
            self._events += rules.abort_waiting(session, rules.closing(session, _cause_name(cause)))
            session.closing = cause
            self._settle(session)
        self._records.pop(engine, None)
        return len(sessions)

    # ------------------------------------------------------------ streams

    def attach(
        self, session: Session, owner: object, handle: int, now: float, *, max_epoch: int = 0, number: int = 0
    ) -> Attachment:
        """Gives the session to a stream. A stream that held it is fenced: its waiting steps are aborted.

        With a `number`, the stream's steps may come as offers: it is the stream's alone, and never used again.

        Raises:
            Refused: DRAINING, or SESSION_TAKEN_OVER where the epoch is above `max_epoch` (0: any).
        """
        self.admit(0)
        if max_epoch and session.epoch > max_epoch:
            raise Refused(rules.taken_over(session))
        session.epoch += 1
        session.last_used_at = now
        former = session.attachment
        if former is not None:
            self._events += rules.abort_waiting(session, rules.taken_over(session))
            self._leave(former, session_pb2.DETACH_CAUSE_TAKEN_OVER)
        session.failed_seq = 0
        session.attachment = Attachment(owner, number, handle, session, session.epoch)
        session.regate()
        return session.attachment

    def detach(self, attachment: Attachment, now: float) -> None:
        """Lets go once the accepted steps are answered; then comes a Detached event."""
        attachment.detaching = True
        attachment.session.last_used_at = now
        self._settle(attachment.session)

    def abandon(self, attachments: Iterable[Attachment], now: float) -> None:
        """The stream broke: sessions live on, accepted steps run, and their answers are recorded. No events."""
        for attachment in attachments:
            if attachment.live:
                attachment.live = False
                attachment.session.attachment = None
                attachment.session.last_used_at = now
                attachment.session.regate()

    # ------------------------------------------------------------ steps

    def submit(self, session: Session, submission: Submission, now: float) -> None:
        """Accepts, replays or refuses a step; every submission is answered by exactly one Answer event."""
        session.last_used_at = now
        answers = rules.judge(session, submission, self.limits, draining=self.draining)
        if answers is None:
            self._late.watch(session, rules.accept(session, submission, now).step.deadline)
            return
        self._events += answers
        session.regate()

    def run_now(self, offer: Offer, now: float) -> Sequence[Array] | None:
        """Runs an offer's steps at once; see express. They fit (Engine.fits)."""
        return None if self.draining else express.run_now(self.table, offer, now)

    def run_one_now(self, seat: Attachment, step: Submission, now: float) -> Sequence[Array] | None:
        """Runs one valid step at once; see express. They fit (Engine.fits)."""
        return None if self.draining else express.run_one_now(seat, step, now)

    def run_turn(self, turn: "Turn", now: float) -> "Staging | None":
        """Runs the steps of a turn at once; see express. They fit (Engine.fits)."""
        return None if self.draining else express.run_turn(turn, now)

    def offer(self, offer: Offer, now: float) -> NDArray[np.int64]:
        """Accepts the members whose step is their session's next, within its credit, where nothing is amiss with it.

        Each of them is answered through the offer's sink, once; while the model has too much to do, that is a refusal.
        Returns the other members, in order: their steps are to be submitted one by one.
        """
        return self._flights.offer(offer, now, draining=self.draining)

    def cancel(self, session: Session, seq: int, reply_to: object) -> None:
        """The caller no longer waits. If nobody does and the step is not running, it is taken back: nothing moved."""
        self._events += rules.cancel(session, seq, reply_to)
        self._settle(session)

    def deliver(self, engine: Engine, batch: Batch, result: RunResult | RunFailed, now: float) -> None:
        """Takes a batch back: commits, records, answers, and makes the sessions' next steps ready."""
        finished = engine.deliver(batch, result, now)
        self._flights.land(batch)
        for step in finished:
            self._events += rules.finish(step.context, step)
        for step in finished:
            self._settle(step.context)

    # ------------------------------------------------------------ time

    def expire(self, now: float) -> int:
        """Fails steps that waited too long and closes idle sessions; returns how many were closed."""
        for session in self._late.due(now):
            self._events += rules.time_out(session, now)
            self._late.watch(session, rules.first_deadline(session))
            self._settle(session)
        for late in self._flights.late(now):
            if late.pending:
                self._events += rules.time_out(late, now)
                self._settle(late)
        return self._expire_idle(now) if now >= self._idle_at else 0

    def next_expiry_at(self) -> float:
        """`expire` has nothing to do before this time."""
        return min(self._idle_at, self._late.next_at(), self._flights.next_at())

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------ within

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _record(self, engine: Engine) -> Record:
        record = self._records.get(engine)
        if record is None:
            record = Record(next(self._record_numbers), engine.spec.outputs, self.table)
            self._records[engine] = record
        return record

    def _expire_idle(self, now: float) -> int:
        """Closes idle sessions, and finds out when to look again."""
        rows, next_at = self.table.idle(now)
        count = 0
        for row in rows.tolist():
            session = self.table.sessions[row]
            if session is None:
                continue
            if session.pending:
                # Steps under way: not idle. Look again when it could be, at the earliest.
                session.last_used_at = now
                next_at = min(next_at, now + session.options.idle_timeout_s)
                continue
            self._remove(session, rules.expired(session), session_pb2.DETACH_CAUSE_EXPIRED)
            count += 1
        # A look costs some nanoseconds a row, and many sessions are due at many moments: 1 % of the time at most.
        self._idle_at = max(next_at, now + _LOOK_S * len(self.table.sessions))
        return count

    def _settle(self, session: Session) -> None:
        """Carries out a close or a detach that waited for the last answer, and opens the gate where nothing waits."""
        if self.sessions.get(session.id) is not session:
            return
        if not session.pending:
            if session.closing is not None:
                self._remove(session, rules.closing(session, _cause_name(session.closing)), session.closing)
                return
            if session.attachment is not None and session.attachment.detaching:
                self._leave(session.attachment, session_pb2.DETACH_CAUSE_DETACHED)
        session.regate()

    def _remove(self, session: Session, gone: Fault, cause: DetachCause) -> None:
        del self.sessions[session.id]
        self._late.forget(session)
        session.closing = cause
        session.engine.free(session.lane)
        self.closed[_cause_name(cause)] += 1
        self._departed.remember(session.id, gone)
        if session.attachment is not None:
            self._leave(session.attachment, cause)
        self._events += [Closed(waiter, session.applied_seq) for waiter in session.close_waiters]
        session.close_waiters = ()
        session.retire()

    def _leave(self, attachment: Attachment, cause: DetachCause) -> None:
        session = attachment.session
        if session.attachment is attachment:
            session.attachment = None
        if attachment.live:
            attachment.live = False
            self._events.append(Detached(attachment, cause, session.applied_seq))


def _cause_name(cause: DetachCause) -> str:
    return session_pb2.DetachCause.Name(cause).removeprefix("DETACH_CAUSE_").lower()
