"""Where the answers of a stream's steps go.

Invariant: a seat is the Attachment itself, and what is told of it is made when a step asks for it: a session that does
nothing has nothing of this.
"""

from collections.abc import Callable

from conveyor_server.servicers.core import trace_of
from conveyor_server.sessions.events import Answer, Attachment, Closed
from conveyor_server.tracing import CallTrace


class Reply:
    """Takes the answers of one attachment's steps in one of the two forms."""

    __slots__ = ("_seat", "_take")

    def __init__(self, seat: Attachment, take: Callable[[Attachment, Answer], None]) -> None:
        self._seat = seat
        self._take = take

    @property
    def trace(self) -> CallTrace | None:
        """Of the stream."""
        return trace_of(self._seat.owner)

    def answered(self, answer: Answer) -> None:
        """A step is answered."""
        self._take(self._seat, answer)

    def closed(self, event: Closed) -> None:
        """The session is gone, as the Detached event before has told."""


class Nobody:
    """Takes what nobody waits for: of steps whose stream broke, the answers are recorded, for whoever resumes."""

    def answered(self, answer: Answer) -> None:
        """A step is answered."""

    def closed(self, event: Closed) -> None:
        """The session is gone."""


NOBODY = Nobody()
