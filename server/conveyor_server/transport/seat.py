"""A session under its handle on a stream, and where the answers of its steps go."""

from collections.abc import Callable

from conveyor_server.sessions.events import Answer, Attachment, Closed


class Reply:
    """Takes the answers of one seat's steps in one of the two forms. One for a seat, so that a step costs none."""

    __slots__ = ("_seat", "_take")

    def __init__(self, seat: "Seat", take: "Callable[[Seat, Answer], None]") -> None:
        self._seat = seat
        self._take = take

    def answered(self, answer: Answer) -> None:
        """A step is answered."""
        self._take(self._seat, answer)

    def closed(self, event: Closed) -> None:
        """The session is gone, as the Detached event before has told."""


class Nobody:
    """Takes the answers of steps whose stream broke: they are recorded, for whoever resumes the session."""

    def answered(self, answer: Answer) -> None:
        """A step is answered."""

    def closed(self, event: Closed) -> None:
        """The session is gone."""


class Seat:
    """A session that a stream holds.

    Attributes:
        attachment: the session, handle and epoch.
        leaving: the client has let go: the seat takes no more requests.
        single: answers Step messages.
        framed: answers rows of StepFrames.
    """

    __slots__ = ("attachment", "framed", "leaving", "single")

    def __init__(
        self,
        attachment: Attachment,
        single: "Callable[[Seat, Answer], None]",
        framed: "Callable[[Seat, Answer], None]",
    ) -> None:
        self.attachment = attachment
        self.leaving = False
        self.single = Reply(self, single)
        self.framed = Reply(self, framed)
