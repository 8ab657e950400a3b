"""The two ends of a stream call: what a transport gives to whoever serves it, and what it asks in return."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from google.rpc import status_pb2

from conveyor_server.identity.caller import Caller


class Outlet(Protocol):
    """Where a stream's messages go, in order. Core thread only."""

    def put(self, message: bytes) -> None:
        """Queues a message behind the others; after `close`, it is dropped."""

    def close(self, status: status_pb2.Status | None = None) -> None:
        """Nothing follows; what is queued is still sent, and the call ends with that status, or well."""

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""


class Served(Protocol):
    """What a stream's messages are for. Core thread only.

    Attributes:
        eager: the next message is wanted before this one is answered.
        gathers: a run is better for what follows its messages: their steps are few each.
    """

    @property
    def eager(self) -> bool:
        """See above."""

    @property
    def gathers(self) -> bool:
        """See above."""

    def receive(self, data: bytes) -> None:
        """Takes a message."""

    def half_close(self) -> None:
        """The client sends no more."""

    def broken(self) -> None:
        """The call is gone, in whatever way."""


class Lingering(Served, Protocol):
    """What can be sent away when the server stops. Core thread only."""

    def go_away(self, grace_s: float) -> None:
        """The server stops in `grace_s` seconds."""

    def stop_lingering(self) -> None:
        """The client had the time to end the call by itself: it ends with the last answer."""


# Serves a call that begins, given where its messages go, what its client sent ahead, by lower-case key, and who it is.
Opener: TypeAlias = Callable[[Outlet, Mapping[str, str], Caller], Lingering]


class TurnedAway:
    """A call that is refused before it begins, and has been told so. See Served."""

    eager = gathers = False

    def receive(self, data: bytes) -> None:
        """Whatever it sends is not looked at."""

    def half_close(self) -> None:
        """It has been told all there is to say."""

    def broken(self) -> None:
        """Nothing of it was kept."""
