"""A stream that the transport answers by itself: what it costs to move messages, and nothing else.

Only where the server's settings allow it (`--diagnostics`); load tests ask for it to tell the wire from the rest.
"""

from conveyor_server.transport.ends import Outlet


class EchoCall:
    """Sends each message back as it came. Core thread only; see StreamCall for the methods."""

    eager = gathers = False

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def receive(self, data: bytes) -> None:
        """Takes one message."""
        self._outlet.put(data)

    def half_close(self) -> None:
        """The client sends no more."""
        self._outlet.close()

    def go_away(self, grace_s: float) -> None:
        """The server stops: there is nothing to lose."""
        del grace_s
        self._outlet.close()

    def stop_lingering(self) -> None:
        """It never lingers."""

    def broken(self) -> None:
        """The call is gone."""
        self._outlet.close()
