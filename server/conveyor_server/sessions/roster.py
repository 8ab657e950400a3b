"""Who lives here, who is gone and why: how sessions begin and end.

Invariant: a session that is not here is refused with the reason; it is never silently begun again from zeros. What is
done here is synchronous, and its effects on clients are events.
"""

import itertools
import math
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import full_name
from conveyor_server.sessions import refusals, rules
from conveyor_server.sessions.departed import Departed
from conveyor_server.sessions.events import Attachment, Closed, Detached, Event
from conveyor_server.sessions.expiry import Deadlines
from conveyor_server.sessions.keeping import KEEPS_NOTHING, Keeping
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.session import DetachCause, Session, SessionOptions
from conveyor_server.sessions.table import SessionTable

SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Roster:
    """All sessions of a server, as they come and go. Core thread only; see Directory, which is one."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self.draining = False
        self.sessions: dict[str, Session] = {}
        # Sessions that a stream holds and whose state is in the store alone.
        self.asleep: dict[str, Session] = {}
        self.keeping: Keeping = KEEPS_NOTHING
        self.table = SessionTable(limits.max_sessions)
        self.opened = 0
        self.closed: Counter[str] = Counter()
        self._departed = Departed(limits.remembered)
        self._records: dict[Engine, Record] = {}
        # Numbers are never used again: a row of the table may still name the record of an engine that is gone.
        self._record_numbers = itertools.count(1)
        self._idle_at = math.inf
        self._late = Deadlines(rules.first_deadline)
        # `reply_to` of those who asked for a session's end.
        self._close_waiters: defaultdict[Session, list[object]] = defaultdict(list)
        self._events: list[Event] = []

    # ------------------------------------------------------------ life

    def lookup(self, session_id: str) -> Session:
        """The live session of that full name.

        Raises:
            Refused: SESSION_NOT_FOUND, or SESSION_EXPIRED or SESSION_CLOSED while that is remembered.
        """
        session = self.sessions.get(session_id)
        if session is not None:
            if session.closing is not None:
                raise Refused(refusals.closing(session))
            return session
        raise Refused(self._departed.why(session_id))

    def why_gone(self, session_id: str) -> Fault:
        """Why a session is not here: SESSION_EXPIRED or SESSION_CLOSED while that is remembered, or NOT_FOUND."""
        return self._departed.why(session_id)

    def admit(self, sessions: int = 1) -> None:
        """Returns where so many more sessions can be created.

        Args:
            sessions: how many; 0: it is asked only whether the server takes anything new.

        Raises:
            Refused: DRAINING or SESSIONS_EXHAUSTED.
        """
        limits = self.limits
        if self.draining:
            raise Refused(refusals.stopping(limits.retry_s))
        if sessions and len(self.sessions) + sessions > limits.max_sessions:
            raise Refused(refusals.full(limits))

    def create(
        self,
        engine: Engine,
        now: float,
        *,
        session_id: str = "",
        tenant: str = "",
        max_of_tenant: int = 0,
        max_in_flight: int = 0,
        idle_timeout_s: float = 0.0,
    ) -> Session:
        """A fresh session; zeros take the server's defaults, and what exceeds its limits is lowered to them.

        `session_id` is what the tenant calls it; `max_of_tenant` is how many sessions it may have in memory.

        Raises:
            Refused: DRAINING, SESSIONS_EXHAUSTED, SESSION_EXISTS or SESSION_ID_INVALID.
        """
        self.admit()
        most = max_of_tenant or self.limits.max_per_tenant
        if tenant and most and self.table.of_tenant[tenant] >= most:
            raise Refused(refusals.tenant_full(tenant, most, self.limits.retry_s))
        name = self.new_name(session_id, tenant)
        options = self.limits.grant(max_in_flight, idle_timeout_s, tenant)
        session = Session(name, engine, self._record(engine), options, now)
        self._settle_in(session, options, now)
        self.opened += 1
        return session

    def new_name(self, session_id: str = "", tenant: str = "") -> str:
        """The full name of a tenant's session of that id, or of one of the server's choice, if it can be created here.

        Of a session that is stored the store knows whether there is one.

        Raises:
            Refused: SESSION_EXISTS or SESSION_ID_INVALID.
        """
        session_id = session_id or secrets.token_hex(12)
        if not SESSION_ID.fullmatch(session_id):
            raise refuse(
                e.ERROR_REASON_SESSION_ID_INVALID,
                "a session id is 1 to 128 letters, digits, '.', '_', ':' or '-'; leave it empty to be given one",
                session_id=session_id[:128],
            )
        name = full_name(tenant, session_id)
        known = self.sessions.get(name)
        if known is not None and not known.stored:
            raise Refused(refusals.exists(name))
        return name

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
            tenant=parent.options.tenant,
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
        tenant: str = "",
        max_of_tenant: int = 0,
        max_in_flight: int = 0,
        idle_timeout_s: float = 0.0,
    ) -> Session:
        """A session that goes on from `states`, one `[*shape]` array for each of ModelSpec.states; None: fresh.

        Raises:
            Refused: as `create`.
        """
        session = self.create(
            engine,
            now,
            session_id=session_id,
            tenant=tenant,
            max_of_tenant=max_of_tenant,
            max_in_flight=max_in_flight,
            idle_timeout_s=idle_timeout_s,
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
        self._close_waiters[session].append(reply_to)
        self._settle(session)

    def close_all(self, engine: Engine, cause: DetachCause, now: float) -> int:
        """Closes all sessions of an engine that no longer takes part; steps not yet running are aborted.

        A session whose step is running goes when that is delivered. Returns how many there were.
        """
        sessions = [session for session in self.sessions.values() if session.engine is engine]
        for session in sessions:
            session.last_used_at = now
            self._events += rules.abort_waiting(session, refusals.closing(session, _cause_name(cause)))
            session.closing = cause
            self._settle(session)
        self._records.pop(engine, None)
        return len(sessions)

    # ------------------------------------------------------------ within

    def _record(self, engine: Engine) -> Record:
        record = self._records.get(engine)
        if record is None:
            record = Record(next(self._record_numbers), engine.spec.outputs, self.table)
            self._records[engine] = record
        return record

    def _settle(self, session: Session) -> None:
        """Carries out a close or a detach that waited for the last answer, and opens the gate where nothing waits."""
        if self.sessions.get(session.id) is not session:
            return
        self._before_settling(session)
        if not session.pending:
            if session.closing is not None:
                if not session.stored or self.keeping.may_close(session):
                    self._remove(session, _why_gone(session, session.closing), session.closing)
                    return
            elif (held := session.attachment) is not None and held.detaching:
                self._leave_when_stored(held)
        session.regate()

    def _before_settling(self, session: Session) -> None:
        """None of the session's steps runs, perhaps: what waits for that, see Removals."""

    def _leave_when_stored(self, held: Attachment) -> None:
        session = held.session
        if not session.stored or self.keeping.may_leave(session):
            self._leave(held, session_pb2.DETACH_CAUSE_DETACHED)

    def _settle_in(self, session: Session, options: SessionOptions, now: float) -> None:
        """It lives here from now on."""
        self.sessions[session.id] = session
        self._departed.forget(session.id)
        self._idle_at = min(self._idle_at, now + options.idle_timeout_s)

    def _remove(self, session: Session, gone: Fault, cause: DetachCause) -> None:
        del self.sessions[session.id]
        self._late.forget(session)
        session.engine.free(session.lane)
        self._gone(session, gone, cause)

    def _gone(self, session: Session, gone: Fault, cause: DetachCause) -> None:
        session.closing = cause
        self.closed[_cause_name(cause)] += 1
        if cause != session_pb2.DETACH_CAUSE_TAKEN_OVER:
            self._departed.remember(session.id, gone)
        if session.attachment is not None:
            self._leave(session.attachment, cause)
        lives_on = gone if cause == session_pb2.DETACH_CAUSE_TAKEN_OVER else None
        waiters = self._close_waiters.pop(session, ())
        self._events += [Closed(waiter, session.applied_seq, lives_on) for waiter in waiters]
        session.retire()

    def _leave(self, attachment: Attachment, cause: DetachCause) -> None:
        if attachment.live:
            session = attachment.session
            session.attachment = None
            self._events.append(Detached(attachment, cause, session.applied_seq))


def _why_gone(session: Session, cause: DetachCause) -> Fault:
    if cause == session_pb2.DETACH_CAUSE_TAKEN_OVER:
        return refusals.taken_over(session)
    if cause == session_pb2.DETACH_CAUSE_EXPIRED:
        return refusals.expired(session)
    return refusals.closing(session, _cause_name(cause))


def _cause_name(cause: DetachCause) -> str:
    return session_pb2.DetachCause.Name(cause).removeprefix("DETACH_CAUSE_").lower()
