"""The messages that one turn brought, of all connections.

Invariant: messages stand in the order in which they came. Those that lay whole in one DATA frame are positions in the
turn's buffer, for the arrays to read; those that were spread over several frames are bytes of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from conveyor.bench.spec import LoadError


@dataclass(slots=True)
class Inbox:
    """What has come. Valid until the next turn.

    Attributes:
        buffer: the bytes that were received.
        offsets: where each message begins in the buffer, behind gRPC's prefix.
        sizes: bytes of each message.
        streams: index of each message's stream.
        loose: messages with bytes of their own: how many of the others came before, stream, message.
        ended: streams that ended: stream, gRPC status or None, its text.
    """

    buffer: memoryview
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    loose: list[tuple[int, int, bytes]] = field(default_factory=list)
    ended: list[tuple[int, int | None, str]] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets everything."""
        for found in (self.offsets, self.sizes, self.streams, self.loose, self.ended):
            found.clear()

    def check(self) -> None:
        """Raises LoadError where a stream ended."""
        for stream, status, text in self.ended:
            raise LoadError(f"stream {stream} ended (gRPC status {status}): {text}")

    def view(self, index: int) -> memoryview:
        """The bytes of a message that lies in the buffer."""
        start = self.offsets[index]
        return self.buffer[start : start + self.sizes[index]]

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """Stream and bytes of each message, in order."""
        done = 0
        for before, stream, data in self.loose:
            for index in range(done, before):
                yield self.streams[index], self.view(index)
            yield stream, memoryview(data)
            done = before
        for index in range(done, len(self.offsets)):
            yield self.streams[index], self.view(index)
