"""What a stream still has to send, in order.

Invariant: one writer takes messages in the order in which they were put; the reader waits for room, so a client that
reads slowly costs no more than the limit, one request's answers and its credit.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A serialized message.

    Attributes:
        data: what is sent.
        written: called when it has left, or None.
    """

    data: bytes
    written: Callable[[], None] | None = None


class Outbox:
    """Serialized messages of one stream. Core thread only; one reader and one writer wait on it.

    Args:
        max_bytes: with more than this waiting, no request is read.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._queue: deque[Outgoing] = deque()
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._failure: Exception | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, message: Message, written: Callable[[], None] | None = None) -> None:
        """Queues a message behind the others; after `close`, it is dropped."""
        if self._closed:
            return
        data = message.SerializeToString()
        self._queue.append(Outgoing(data, written))
        self.bytes += len(data)
        if self.bytes > self.max_bytes:
            self._room.clear()
        self._some.set()

    def close(self) -> None:
        """Nothing follows; what is queued is still sent."""
        self._closed = True
        self._some.set()

    def fail(self, failure: Exception) -> None:
        """Nothing more is sent: the writer gets this error instead."""
        self._failure = failure
        self.close()

    async def take(self) -> Outgoing | None:
        """The next message, or None after the last.

        Raises:
            Exception: what `fail` was given.
        """
        while not self._queue and not self._closed:
            self._some.clear()
            await self._some.wait()
        if self._failure is not None:
            raise self._failure
        if not self._queue:
            return None
        outgoing = self._queue.popleft()
        self.bytes -= len(outgoing.data)
        if self.bytes <= self.max_bytes:
            self._room.set()
        return outgoing

    async def room(self) -> None:
        """Returns when there is room for the answers of one more request."""
        await self._room.wait()
