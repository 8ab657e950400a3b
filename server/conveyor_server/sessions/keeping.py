"""What the directory asks of whoever keeps sessions in a store, and what comes back from there.

Invariant: a session whose record is in the store leaves its stream, or ends, only when the store has what it must.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conveyor_proto.codec import Array

from conveyor_server.engine.engine import Engine
from conveyor_server.sessions.record import Recorded
from conveyor_server.sessions.session import Session, SessionOptions


class Keeping(Protocol):
    """Keeps sessions in a store. Core thread only."""

    def may_leave(self, session: Session) -> bool:
        """All that the session has applied is in the store. False: Directory.settle follows once it is."""

    def may_close(self, session: Session) -> bool:
        """The session's record is gone. False: Directory.settle follows once it is, and `stored` is False then."""

    def may_go_on(self, session: Session) -> bool:
        """The store knows that the session is of another version of its model now. False: Directory.go_on follows."""


class _KeepsNothing:
    """Of a server whose sessions live in memory alone."""

    def may_leave(self, session: Session) -> bool:
        """No session has a record."""
        raise AssertionError(f"session {session.id!r} is stored, and there is no store")

    may_close = may_go_on = may_leave


KEEPS_NOTHING: Keeping = _KeepsNothing()


@dataclass(frozen=True, slots=True)
class Kept:
    """A session as it comes from the store, or as it is to be from its beginning.

    Attributes:
        session_id: its full name, see identity.caller.
        engine: of its model version.
        options: what it was granted.
        epoch: in the store.
        states: one `[*shape]` array for each of ModelSpec.states; None: a fresh session.
        applied_seq, applied_time_steps: see Session.
        durable_seq: how much of that is in the store.
        created_at: seconds of the driver's clock.
        answers: of the last steps, the oldest first.
        max_sessions: of its tenant's own, for one that is to be; 0: as of all.
    """

    session_id: str
    engine: Engine
    options: SessionOptions
    epoch: int
    states: Sequence[Array] | None
    applied_seq: int
    applied_time_steps: int
    durable_seq: int
    created_at: float
    answers: Sequence[Recorded] = ()
    max_sessions: int = 0
