"""What a stream still has to send, in order.

Invariant: one writer takes messages in the order in which they were put; the reader waits for room, so a client that
reads slowly costs no more than the limit, one request's answers and its credit.
"""

import asyncio
from collections import deque

from google.rpc import status_pb2


class StreamFailed(Exception):  # noqa: N818 - it says what happened
    """A stream cannot go on.

    Attributes:
        status: what the client is told.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class Outbox:
    """Serialized messages of one stream. Core thread only; one reader and one writer wait on it.

    Args:
        max_bytes: with more than this waiting, no request is read.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._queue: deque[bytes] = deque()
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        # How the call ends: at once, and after what is queued.
        self._failure: StreamFailed | None = None
        self._end: StreamFailed | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, message: bytes) -> None:
        """Queues a message behind the others; after `close`, it is dropped."""
        if self._closed:
            return
        self._queue.append(message)
        self.bytes += len(message)
        if self.bytes > self.max_bytes:
            self._room.clear()
        self._some.set()

    def close(self, status: status_pb2.Status | None = None) -> None:
        """Nothing follows; what is queued is still sent, and the call ends with that status, or well."""
        if status is not None and self._end is None:
            self._end = StreamFailed(status)
        self._closed = True
        self._some.set()

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""
        self._failure = self._failure or StreamFailed(status)
        self.close()

    async def take(self) -> bytes | None:
        """The next message, or None after the last.

        Raises:
            StreamFailed: the call ends with a status.
        """
        while not self._queue and not self._closed:
            self._some.clear()
            await self._some.wait()
        if self._failure is not None:
            raise self._failure
        if not self._queue:
            if self._end is not None:
                raise self._end
            return None
        message = self._queue.popleft()
        self.bytes -= len(message)
        if self.bytes <= self.max_bytes:
            self._room.set()
        return message

    async def room(self) -> None:
        """Returns when there is room for the answers of one more request."""
        await self._room.wait()
