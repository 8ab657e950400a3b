"""What is asked of the store about one session, and who waits for the answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from conveyor_proto.reasons import Fault

from conveyor_server.sessions.keeping import Kept
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Record

# A session that lives here from now on, at the epoch that the store has counted; or why not.
Opened: TypeAlias = Session | Fault
Then: TypeAlias = Callable[[Opened], None]


@dataclass(slots=True, eq=False)
class Create:
    """A new session.

    Attributes:
        kept: as it is to be from its beginning.
        then: gets it.
    """

    kept: Kept
    then: Then

    @property
    def session_id(self) -> str:
        """Of the session that is asked for."""
        return self.kept.session_id


@dataclass(slots=True, eq=False)
class Take:
    """A session that is to live here, wherever it has been.

    Attributes:
        session_id: which.
        max_epoch: see Claim.
        min_seq: see Claim.
        until: while the record is behind `min_seq`, it is asked again until this moment; seconds of the driver's clock.
        then: gets it.
        missing: called instead where the store has no such session; None: `then` is told.
        asked_at: when it was asked; seconds of the driver's clock, which is time.monotonic.
        not_before: it is not asked for again before this moment.
    """

    session_id: str
    max_epoch: int
    min_seq: int
    until: float
    then: Then
    missing: Callable[[], None] | None = None
    asked_at: float = 0.0
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class Wake:
    """A session that a stream here holds, and whose state is in the store alone.

    Attributes:
        session: which.
        then: gets it.
    """

    session: Session
    then: Then

    @property
    def session_id(self) -> str:
        """Of the session that is asked for."""
        return self.session.id


@dataclass(slots=True, eq=False)
class Peek:
    """What the store has of a session, which nothing changes.

    Attributes:
        session_id: which.
        then: gets the record, or None where there is none, or why that is not known.
    """

    session_id: str
    then: Callable[[Record | Fault | None], None]


@dataclass(slots=True, eq=False)
class Fetch:
    """The state of a session that was taken without it, because it was here; and is not any more.

    Attributes:
        take: who asked.
        epoch: as it was taken.
    """

    take: Take
    epoch: int

    @property
    def session_id(self) -> str:
        """Of the session that is asked for."""
        return self.take.session_id

    @property
    def then(self) -> Then:
        """Gets it."""
        return self.take.then


Ask: TypeAlias = Create | Take | Wake | Fetch | Peek
