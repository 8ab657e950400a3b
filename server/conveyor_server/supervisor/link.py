"""The link between a supervisor and one of its workers, and the worker's end of it.

Invariant: a worker serves only as long as its supervisor holds the other end. The link's end begins the worker's drain,
whether the supervisor asked for it or was killed; so no worker outlives its supervisor for longer than a drain.
"""

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass

_log = logging.getLogger("conveyor")
# Not a setting: the prefix keeps it out of them.
_VARIABLE = "_CONVEYOR_WORKER"


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of its start, as one line of JSON.

    Attributes:
        metrics_port: where its pages are, once it is ready.
        error: why it cannot start.
    """

    metrics_port: int | None = None
    error: str | None = None

    def encode(self) -> bytes:
        """The line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Report":
        """The report of a line; of an empty one, the report of a worker that ended without a word."""
        return cls(**json.loads(line or b"{}"))


def address(index: int, descriptor: int) -> dict[str, str]:
    """The environment in which a new process finds its link."""
    return {_VARIABLE: f"{index}:{descriptor}"}


class Link:
    """The worker's end, open for as long as the process.

    Attributes:
        index: which worker this is, from 0.
    """

    def __init__(self, index: int, descriptor: int) -> None:
        self.index = index
        self._descriptor = descriptor

    @classmethod
    def inherited(cls, environment: MutableMapping[str, str]) -> "Link | None":
        """The link that this process was started with, which is then taken out of the environment; None without."""
        index, found, descriptor = environment.pop(_VARIABLE, "").partition(":")
        if not found:
            return None
        os.set_inheritable(int(descriptor), False)
        return cls(int(index), int(descriptor))

    def tell(self, report: Report) -> None:
        """Reports to the supervisor, if it is still there."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            os.write(self._descriptor, report.encode())

    def watch(self, ended: Callable[[], None], loop: asyncio.AbstractEventLoop, patience_s: float) -> None:
        """Waits for the end of the link, on a thread of its own.

        Args:
            ended: called once the link has ended.
            loop: on which `ended` is called.
            patience_s: how long the process may take from there before it is ended: a loop that no longer turns would
                never do it.
        """

        def wait() -> None:
            with contextlib.suppress(ConnectionResetError):
                # The supervisor sends nothing: what comes is the end.
                os.read(self._descriptor, 1)
            # A loop that is closed belongs to a process that ends.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended)
            # The process ends under this thread, which is a daemon; or it does not.
            threading.Event().wait(patience_s)
            _log.error("it did not stop within %.0f s: the process ends as it is", patience_s)
            logging.shutdown()
            os._exit(1)

        threading.Thread(target=wait, name="link", daemon=True).start()
