"""A process of the bench's own, and how the bench talks to it.

Invariant: between two commands a worker does nothing, so it takes no CPU from what is measured.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.cases import Case
from benchmarks.figures import Done, Figures

_TIMEOUT_S = 60.0
_spawn = multiprocessing.get_context("spawn")


class WorkerError(RuntimeError):
    """A worker raised, ended or did not answer; the message holds its traceback."""


class Driver(Protocol):
    """What a worker can do."""

    def open(self, case: Case) -> None:
        """Prepares a case, up to the point where only running is left."""

    def run(self, case: Case, seconds: float) -> Done:
        """Puts load on for that long; returns when all that was sent is answered."""

    def figures(self) -> Figures:
        """What was seen in the last run."""

    def tend(self) -> None:
        """Keeps what is open alive."""

    def clear(self) -> None:
        """Ends what `open` began; other cases may follow."""

    def close(self) -> None:
        """As clear, for good."""


class Child:
    """A process that ends with the bench, and a connection to it.

    Args:
        main: what it runs; importable by name.
        arguments: what `main` gets after the connection.
    """

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        self.connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_begin, args=(main, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid or 0

    def receive(self, timeout_s: float = _TIMEOUT_S) -> Any:
        """The next object that the process sends.

        Raises:
            WorkerError: it ended, or sent nothing in time.
        """
        try:
            if self.connection.poll(timeout_s):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(f"process {self.pid} ended") from None
        raise WorkerError(f"process {self.pid} did not answer within {timeout_s:.0f} s")

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._process.terminate()
        self._process.join(_TIMEOUT_S)


class Worker:
    """A driver in a process of its own.

    Args:
        make_driver: called there; importable by name.
        arguments: its arguments.
    """

    def __init__(self, make_driver: Callable[..., Driver], *arguments: Any) -> None:
        self._child = Child(_work, make_driver, arguments)
        self._failed = False
        try:
            self._answer()
        except WorkerError:
            self._child.stop()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def open(self, case: Case) -> None:
        """As Driver.open."""
        self._call("open", case)

    def run(self, case: Case, seconds: float) -> Done:
        """As Driver.run."""
        done: Done = self._call("run", case, seconds, timeout_s=seconds + _TIMEOUT_S)
        return done

    def figures(self) -> Figures:
        """As Driver.figures."""
        figures: Figures = self._call("figures")
        return figures

    def tend(self) -> None:
        """As Driver.tend."""
        self._call("tend")

    def clear(self) -> None:
        """As Driver.clear."""
        self._call("clear")

    def close(self) -> None:
        """Ends the driver, unless it failed before, and its process."""
        try:
            if not self._failed:
                self._call("close")
        finally:
            self._child.stop()

    def _call(self, method: str, *arguments: Any, timeout_s: float = _TIMEOUT_S) -> Any:
        self._child.connection.send((method, arguments))
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float = _TIMEOUT_S) -> Any:
        self._failed = True
        failure, answer = self._child.receive(timeout_s)
        if failure:
            raise WorkerError(failure)
        self._failed = False
        return answer


def _begin(main: Callable[..., None], *arguments: Any) -> None:
    # Ctrl-C reaches the whole group; the bench ends its processes itself, in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(*arguments)


def _work(connection: Connection, make_driver: Callable[..., Driver], arguments: tuple[Any, ...]) -> None:
    """Carries out commands until the bench is gone."""
    try:
        driver = make_driver(*arguments)
        connection.send(("", None))
        while True:
            method, given = connection.recv()
            connection.send(("", getattr(driver, method)(*given)))
    except (EOFError, ConnectionError):
        return
    except Exception:  # told to the bench, which ends the run
        connection.send((traceback.format_exc(), None))
