"""A child process that can be killed, frozen and asked to end, and whose output goes to a file.

Invariant: whoever starts one ends it (`kill` is always allowed, also of one that is frozen or gone).
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LOOK_S = 0.02
_END_S = 10.0
# Below are those of well-known services.
_FIRST_PORT = 10_240
_given: set[int] = set()


class Process:
    """A program that can be started again and again; `start` is not called by the constructor.

    Args:
        command: the program and its arguments.
        log: its output, of all its lives.
        environment: all of its variables; None: those of this process.
        folder: where it runs; None: where this process does.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        self._environment = environment
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """It was started and has not ended; a frozen one runs."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """Of the life that it is in, or was in last."""
        if self._child is None:
            raise AssertionError(f"{self.command[0]} was never started")
        return self._child.pid

    @property
    def resident_bytes(self) -> int:
        """Memory that is in RAM; 0 where it does not run."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
        except OSError:
            return 0

    def start(self) -> None:
        """Starts it."""
        if self.running:
            raise AssertionError(f"process {self.pid} runs already")
        with self.log.open("ab") as sink:
            # A session of its own: Ctrl-C is for whoever started it, who ends all of them.
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As if the machine had lost its power: SIGKILL. Returns when it is gone."""
        if self._child is not None:
            self._child.kill()
            self._child.wait(_END_S)

    def freeze(self) -> None:
        """Takes its CPU away: SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Gives it back: SIGCONT."""
        self._signal(signal.SIGCONT)

    def terminate(self, timeout_s: float) -> int:
        """Asks it to end: SIGTERM. Returns its exit status.

        Raises:
            AssertionError: it did not end in time; it is killed then.
        """
        self._signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Waits for its end and returns its exit status.

        Raises:
            AssertionError: it did not end in time; it is killed then.
        """
        if self._child is None:
            raise AssertionError("it was never started")
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"process {self.pid} did not end within {timeout_s:g} s\n{self.tail()}") from None

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Asks again and again until it is ready.

        Raises:
            AssertionError: it ended, or it was not ready in time.
        """
        give_up_at = time.monotonic() + timeout_s
        while not ready():
            if not self.running:
                raise AssertionError(f"{self.command} ended\n{self.tail()}")
            if time.monotonic() > give_up_at:
                raise AssertionError(f"{self.command} was not ready within {timeout_s:g} s\n{self.tail()}")
            time.sleep(_LOOK_S)

    def tail(self, characters: int = 4000) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def _signal(self, number: int) -> None:
        if self._child is None:
            raise AssertionError("it was never started")
        self._child.send_signal(number)


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which nobody listens now, and which the system gives to nobody who does not ask for them.

    A port that the system hands out could be gone by the time that its server starts, or starts again: connections that
    are made meanwhile get one too.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(_FIRST_PORT, lowest)
        if port not in _given and not listens(port):
            _given.add(port)
            ports.append(port)
    return ports


def listens(port: int) -> bool:
    """Somebody accepts connections on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
