"""The two ends of a stream call: what a transport gives to whoever serves it, and what it asks in return."""

from typing import Protocol

from google.rpc import status_pb2


class Outlet(Protocol):
    """Where a stream's messages go, in order. Core thread only."""

    def put(self, message: bytes) -> None:
        """Queues a message behind the others; after `close`, it is dropped."""

    def close(self) -> None:
        """Nothing follows; what is queued is still sent."""

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""


class Served(Protocol):
    """What a stream's messages are for. Core thread only.

    Attributes:
        eager: the next message is wanted before this one is answered.
    """

    @property
    def eager(self) -> bool:
        """See above."""

    def receive(self, data: bytes) -> None:
        """Takes a message."""

    def half_close(self) -> None:
        """The client sends no more."""

    def broken(self) -> None:
        """The call is gone, in whatever way."""
