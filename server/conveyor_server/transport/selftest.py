"""The server calls itself: whether the completion queue does here what it should, and then what rings its alarm.

Invariant: nothing but this process can reach the socket, which is gone from the file system once the call is open, and
nothing else knows the method, which the other ports serve too.
"""

import queue
import secrets
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import grpc
from conveyor_proto.reasons import DOMAIN

from conveyor_server.transport.ends import Outlet

# The completion server answers it, message by message.
SELFTEST_METHOD = f"{DOMAIN}.internal.Loop", secrets.token_hex(16)
_SELFTEST_S = 5.0


class Unusable(Exception):  # noqa: N818 - it says what is so
    """This grpcio does not work as `completion` needs it; the message says what was seen."""


class Mirror:
    """The server's side of the call: sends every message back. See ends.Served."""

    eager = gathers = False

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def receive(self, data: bytes) -> None:
        """Takes one message."""
        self._outlet.put(data)

    def half_close(self) -> None:
        """The client sends no more."""
        self._outlet.close()

    def broken(self) -> None:
        """The call is gone."""


def _private_folder() -> Path:
    """A new folder that this user alone can enter.

    Raises:
        Unusable: none can be made.
    """
    why = ""
    # In a container whose files are read-only there is still shared memory.
    for place in (None, "/dev/shm"):  # noqa: S108 - mkdtemp makes a folder of its own
        try:
            return Path(tempfile.mkdtemp(prefix="conveyor-", dir=place))
        except OSError as error:
            why = why or str(error.strerror)
    raise Unusable(f"no folder could be made for the self-test's socket: {why}")


class SelfTest:
    """A call of the server's own, over a socket that nobody else can reach: first a test, then what `alarm` rings.

    Args:
        server: not started.
        max_message_bytes: that it takes.
    """

    def __init__(self, server: grpc.Server, max_message_bytes: int) -> None:
        self._messages = (b"", b"x" * min(100_000, max_message_bytes), b"conveyor")
        self._folder = _private_folder()
        self._address = f"unix:{self._folder / 'loop'}"
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel: grpc.Channel | None = None
        try:
            server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise Unusable("no socket could be opened for the self-test") from error

    def run(self) -> None:
        """Sends messages through the server and expects them back. Another thread's, while the core's turns.

        Raises:
            Unusable: they did not come back as they should.
        """
        self._channel = grpc.insecure_channel(self._address)
        echo: Any = self._channel.stream_stream("/" + "/".join(SELFTEST_METHOD))
        try:
            answers = echo(iter(self._requests.get, None), timeout=None)
            guard = threading.Timer(_SELFTEST_S, answers.cancel)
            guard.daemon = True
            guard.start()
            try:
                for message in self._messages:
                    self._requests.put(message)
                    if next(answers) != message:
                        raise Unusable("the self-test's message came back changed")
            finally:
                guard.cancel()
        except (grpc.RpcError, StopIteration) as error:
            raise Unusable(f"the self-test's message did not come back: {type(error).__name__}") from error
        finally:
            # Whoever is connected stays so; nobody else comes in.
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Ends the call. Another thread's."""
        self._requests.put(None)
        if self._channel is not None:
            self._channel.close()
        shutil.rmtree(self._folder, ignore_errors=True)
