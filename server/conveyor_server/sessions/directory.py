"""The session directory: who holds whom, what is stepped, and what time does.

Everything here is synchronous, takes the time as an argument, and runs on the core thread. Effects that must reach
a client are events, taken with `take_events` after each call.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.runner.base import RunFailed, RunResult
from conveyor_server.sessions import express, refusals, rules
from conveyor_server.sessions.events import Attachment, Event
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.flights import Flights
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.removals import Removals
from conveyor_server.sessions.session import Session, Submission

if TYPE_CHECKING:
    from conveyor_server.compiled import Staging, Turn

# How long a look for idle sessions is put off for each row of the table.
_LOOK_S = 1e-6


class Directory(Removals):
    """All sessions of a server. Core thread only."""

    def __init__(self, limits: SessionLimits) -> None:
        super().__init__(limits)
        self._flights = Flights(self.table, limits, tell=self._tell, watch=self._late.watch)

    # ------------------------------------------------------------ streams

    def attach(
        self,
        session: Session,
        owner: object,
        handle: int,
        now: float,
        *,
        max_epoch: int = 0,
        number: int = 0,
        epoch: int = 0,
    ) -> Attachment:
        """Gives the session to a stream. A stream that held it is fenced: its waiting steps are aborted.

        With a `number`, the stream's steps may come as offers: it is the stream's alone, and never used again. With an
        `epoch`, that is the session's from now on: the store has counted.

        Raises:
            Refused: DRAINING, or SESSION_TAKEN_OVER where the epoch is above `max_epoch` (0: any).
        """
        self.admit(0)
        if max_epoch and session.epoch > max_epoch:
            raise Refused(refusals.taken_over(session))
        session.epoch = epoch or session.epoch + 1
        session.last_used_at = now
        former = session.attachment
        if former is not None:
            self._events += rules.abort_waiting(session, refusals.taken_over(session))
            self._leave(former, session_pb2.DETACH_CAUSE_TAKEN_OVER)
        session.failed_seq = 0
        session.attachment = Attachment(owner, number, handle, session, session.epoch)
        session.regate()
        return session.attachment

    def detach(self, attachment: Attachment, now: float) -> None:
        """Lets go once the accepted steps are answered; then comes a Detached event."""
        attachment.detach()
        session = attachment.session
        if session.asleep:
            if session.attachment is attachment:
                self.asleep.pop(session.id, None)
                self._leave(attachment, session_pb2.DETACH_CAUSE_DETACHED)
            return
        session.last_used_at = now
        self._settle(session)

    def abandon(self, attachments: Iterable[Attachment], now: float) -> None:
        """The stream broke: sessions live on, accepted steps run, and their answers are recorded. No events."""
        for attachment in attachments:
            if attachment.live:
                session = attachment.session
                session.attachment = None
                if session.asleep:
                    # Nobody holds it: the store has all there is to know of it.
                    self.asleep.pop(session.id, None)
                    continue
                session.last_used_at = now
                session.regate()

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

    @property
    def has_events(self) -> bool:
        """`take_events` has some."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------ within

    def _tell(self, event: Event) -> None:
        self._events.append(event)

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
            session.closing = session_pb2.DETACH_CAUSE_EXPIRED
            self._settle(session)
            count += 1
        # A look costs some nanoseconds a row, and many sessions are due at many moments: 1 % of the time at most.
        self._idle_at = max(next_at, now + _LOOK_S * len(self.table.sessions))
        return count
