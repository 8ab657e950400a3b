"""Sessions that come from the store and go to it, to another server, or to another version of their model.

Invariant: a session goes with all that it is, between two of its steps, and whoever holds it is told what concerns it.
"""

import numpy as np
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.sessions import rules
from conveyor_server.sessions.events import Slept
from conveyor_server.sessions.keeping import Kept
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.migration import move
from conveyor_server.sessions.roster import Roster
from conveyor_server.sessions.session import DetachCause, Session


class Removals(Roster):
    """See above. Core thread only; see Directory, which is one."""

    def __init__(self, limits: SessionLimits) -> None:
        super().__init__(limits)
        # Sessions whose step runs, and which are another engine's afterwards.
        self._moving: dict[Session, Engine] = {}
        self._moved = False

    def bring_in(self, kept: Kept, now: float) -> Session:
        """A session whose record is in the store, and this server's: a new one, or one that comes back from there.

        There is room for it (`table.rows.free`), and no other of its id is here but the one that is asleep.
        """
        options = kept.options
        session = self.asleep.pop(kept.session_id, None)
        if session is None:
            session = Session(kept.session_id, kept.engine, self._record(kept.engine), options, now)
        else:
            session.engine = kept.engine
            session.wake(self._record(kept.engine), options, now)
        session.stored = True
        session.epoch = kept.epoch
        if kept.states is not None:
            kept.engine.write(session.lane, kept.states)
        session.applied_seq = kept.applied_seq
        session.applied_time_steps = kept.applied_time_steps
        for answer in kept.answers:
            session.answers.add(answer)
        self.table.durable_seq[session.row] = kept.durable_seq
        self.table.created_at[session.row] = kept.created_at
        self._settle_in(session, options, now)
        session.regate()
        return session

    def passivate(self, session: Session) -> None:
        """Lets go of the state of a session that has nothing under way: all of it is in the store.

        One that a stream holds stays its, asleep; there comes a Slept event.
        """
        del self.sessions[session.id]
        self._late.forget(session)
        held, refused_seq = session.attachment, session.failed_seq
        session.engine.free(session.lane)
        session.sleep()
        if held is not None:
            self.asleep[session.id] = session
            self._events.append(Slept(held, refused_seq))

    def let_go(self, session: Session, why: Fault, cause: DetachCause, now: float, reply_to: object = None) -> None:
        """The session is somebody else's now, or nobody's, and its record is not this server's to write.

        Steps that wait are refused; one that runs is finished first. Then comes a Detached event (if it was attached),
        and a Closed event for `reply_to` where there is one.
        """
        session.stored = False
        if reply_to is not None:
            self._close_waiters[session].append(reply_to)
        if self.asleep.pop(session.id, None) is not None:
            self._gone(session, why, cause)
            return
        session.last_used_at = now
        self.go_on(session)
        self._events += rules.abort_waiting(session, why)
        session.closing = cause
        self._settle(session)

    def pause(self, session: Session) -> None:
        """A session that has just come in is of another version of its model than the store knows."""
        if rules.pause(session) and self.keeping.may_go_on(session):
            rules.go_on(session)

    def go_on(self, session: Session) -> None:
        """The store has what a session waited for that has moved to another version of its model."""
        if session.paused:
            rules.go_on(session)

    def migrate(self, source: Engine, target: Engine) -> int:
        """Moves the sessions of one engine to another of equal inputs, outputs and states; returns how many.

        One whose step runs moves when that is delivered.
        """
        sessions = [session for session in self.sessions.values() if session.engine is source]
        for session in sessions:
            self._moving[session] = target
            self._move_on(session)
        return len(sessions)

    def settle(self, session: Session) -> None:
        """What the store was asked to do with a session is done: a detach or a close that waited for it goes on."""
        if session.asleep:
            held = session.attachment
            if held is not None and held.detaching:
                self._leave(held, session_pb2.DETACH_CAUSE_DETACHED)
            return
        self._settle(session)

    def suspend(self, durability: int) -> None:
        """Sessions that are at least so durable take no new steps from now on; table.NEVER: all do."""
        self.table.suspended_from = durability
        for row in np.flatnonzero(self.table.durability >= session_pb2.DURABILITY_ASYNC).tolist():
            session = self.table.sessions[row]
            if session is not None:
                session.regate()

    def take_moved(self) -> bool:
        """Sessions have moved to another engine since the last call, which may have something to run."""
        moved, self._moved = self._moved, False
        return moved

    # ------------------------------------------------------------ within

    def _before_settling(self, session: Session) -> None:
        if self._moving and session in self._moving:
            self._move_on(session)

    def _move_on(self, session: Session) -> None:
        """Moves a session that is to move, if none of its steps runs."""
        target = self._moving[session]
        if self.sessions.get(session.id) is not session:
            del self._moving[session]
            return
        if not rules.pause(session):
            return
        del self._moving[session]
        self._moved = True
        move(session, target, self._record(target))
        if not session.stored or self.keeping.may_go_on(session):
            rules.go_on(session)
