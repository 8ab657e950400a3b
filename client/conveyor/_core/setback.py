"""The first step of a session that a stream refused for now, and what followed it there.

Invariant: what is refused for now is kept, and sent again in order, from the first: on this stream once the server has
spoken about every step that it was given, or on the next one.
"""

from conveyor.errors import ConveyorError


class Setback:
    """One session's, on one stream.

    Attributes:
        first: the first step that shall be sent again; None: there was no setback.
        error: why; None: this stream takes it no more, and the next one shall.
    """

    __slots__ = ("_told", "error", "first")

    def __init__(self) -> None:
        self.first: int | None = None
        self.error: ConveyorError | None = None
        self._told: set[int] = set()

    def refused(self, seq: int, error: ConveyorError | None) -> None:
        """That step was refused for now."""
        self.first = seq if self.first is None else min(seq, self.first)
        self.error = error or self.error
        self._told.add(seq)

    def covers(self, seq: int) -> bool:
        """That step could not be applied because of it."""
        return self.first is not None and seq > self.first

    def followed(self, seq: int) -> None:
        """The server said so of that step."""
        self._told.add(seq)

    def told(self, on_stream: int) -> bool:
        """It is to be sent again on this stream, which has spoken about all steps that it was given: so many."""
        return self.error is not None and len(self._told) >= on_stream

    def clear(self) -> None:
        """It is sent again, or the stream is gone."""
        self.first = self.error = None
        self._told.clear()
