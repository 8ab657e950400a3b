"""How many sessions a stream has had, and how many steps they applied meanwhile: for its trace.

Invariant: no step is counted one by one: what a session applied is the difference of its numbers.
"""

from collections.abc import Iterable

from conveyor_server.sessions.events import Attachment
from conveyor_server.tracing import CallTrace


class Presence:
    """Of one traced stream. Core thread only.

    Args:
        trace: of its call.
    """

    __slots__ = ("_applied", "_sessions", "_steps", "_trace")

    def __init__(self, trace: CallTrace) -> None:
        self._trace = trace
        self._sessions = self._steps = 0
        # By handle, what had been applied when the session was attached.
        self._applied: dict[int, int] = {}

    def attached(self, seat: Attachment) -> None:
        """A session has come."""
        self._sessions += 1
        self._applied[seat.handle] = seat.session.applied_seq

    def left(self, handle: int, applied_seq: int) -> None:
        """A session has gone, its last step being that."""
        self._steps += max(0, applied_seq - self._applied.pop(handle, applied_seq))

    def end(self, seats: Iterable[Attachment]) -> None:
        """The stream is gone, and these were there to the end."""
        for seat in seats:
            self.left(seat.handle, seat.session.applied_seq)
        self._trace.counted(self._sessions, self._steps)
