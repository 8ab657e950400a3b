"""A worker as its supervisor sees it: a process, and a link to it.

Invariant: a process that was started is waited for, and its link is closed, whatever happens in between.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from conveyor_server.supervisor.link import Report, address


class WorkerProcess:
    """A worker that was started. `running` makes them."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer

    async def report(self) -> Report:
        """What the worker says of its start, as soon as it does; an empty report when it ends before."""
        return Report.decode(await self._reader.readline())

    async def wait(self) -> int:
        """The exit status; negative, the signal that ended it."""
        return await self._process.wait()

    def drain(self, limit_s: float) -> None:
        """Ends the link, upon which the worker drains; kills a worker that is still there after `limit_s`."""
        if self._process.returncode is None:
            # A worker that has just ended closed it itself.
            with contextlib.suppress(OSError):
                self._writer.write_eof()
            asyncio.get_running_loop().call_later(limit_s, self.kill)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


@contextlib.asynccontextmanager
async def running(index: int, environment: Mapping[str, str]) -> AsyncIterator[WorkerProcess]:
    """Starts worker `index` in an environment; leaving kills it if it still runs.

    Raises:
        OSError: the system starts no more processes.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await asyncio.create_subprocess_exec(
            *_command(),
            env={**environment, **address(index, theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            # Ctrl-C in a terminal reaches whole process groups, and one that is still starting would die of it.
            process_group=0,
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = WorkerProcess(process, reader, writer)
        try:
            yield worker
        finally:
            worker.kill()
            await worker.wait()
            writer.close()


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _command() -> list[str]:
    """This program again, with its warnings and its places of modules.

    Python started as `conveyor serve` looks for no modules in the working directory, but with -m it would.
    """
    places = [] if str(Path.cwd()) in sys.path or "" in sys.path else ["-P"]
    return [sys.executable, *places, *(f"-W{option}" for option in sys.warnoptions), "-m", "conveyor_server"]
