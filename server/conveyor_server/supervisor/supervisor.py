"""Starts the workers, replaces those that die, and ends with the last of them.

Invariant: each index has at most one worker at a time; before all have been ready once, the end of one is the end of
all, and afterwards it is an accident of that one alone. Needs neither grpc nor onnxruntime: it serves nothing itself.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
from collections.abc import Iterator, Mapping

from conveyor_server import configuration
from conveyor_server.configuration import ENVIRONMENT_PREFIX
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings
from conveyor_server.supervisor.port import reserved
from conveyor_server.supervisor.process import WorkerProcess, describe, running

_log = logging.getLogger("conveyor")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a worker gets beyond drain_s before it is killed.
PATIENCE_S = 10.0


class BackOff:
    """How long to wait before a worker is replaced: longer each time that one died young."""

    first_s = 0.5
    longest_s = 30.0
    # A worker that was ready for so long did not die of its start.
    steady_s = 60.0

    def __init__(self) -> None:
        self._young = 0

    def after(self, ready_s: float) -> float:
        """Seconds to wait after a worker that was ready for `ready_s`."""
        if ready_s >= self.steady_s:
            self._young = 0
        delay_s: float = min(self.longest_s, self.first_s * 2**self._young)
        self._young = min(self._young + 1, 16)
        return delay_s


class Supervisor:
    """The parent of `settings.workers` workers. Made and run on one event loop.

    Args:
        settings: of each worker, but for the ports.
        environment: of each worker, but for its settings.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._inherited = {
            name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT_PREFIX)
        }
        self._workers: set[WorkerProcess] = set()
        self._were_ready: set[int] = set()
        self._stopping = asyncio.Event()
        self._error: StartError | None = None
        self._unclean = False

    async def run(self) -> int:
        """Keeps the workers until SIGTERM or SIGINT and returns the exit status: 0 when all of them ended well.

        A second signal kills them.

        Raises:
            StartError: the port is taken, or a worker ended before all were ready; then none is left.
        """
        settings = self._settings
        with reserved(settings.host, settings.port) as port, self._signals():
            # Resolved once: a worker that is started later reads no file or flag that has changed since.
            variables = configuration.environment(dataclasses.replace(settings, port=port))
            environment = {**self._inherited, **variables}
            _log.info("%d workers share grpc on %s:%d", settings.workers, settings.host, port)
            async with asyncio.TaskGroup() as keepers:
                for index in range(settings.workers):
                    keepers.create_task(self._keep(index, environment))
        if self._error is not None:
            raise self._error
        _log.info("stopped: %d workers", settings.workers)
        return int(self._unclean)

    def stop(self) -> None:
        """Begins to drain all workers."""
        _log.info("stopping: %d workers drain", len(self._workers))
        self._stopping.set()
        for worker in self._workers:
            self._drain(worker)

    # ------------------------------------------------------------ within

    async def _keep(self, index: int, environment: Mapping[str, str]) -> None:
        """Has a worker `index` until the supervisor stops."""
        back_off = BackOff()
        while not self._stopping.is_set():
            ready_s, why = await self._once(index, environment)
            if self._stopping.is_set():
                return
            if len(self._were_ready) < self._settings.workers:
                self._error = StartError(why)
                self.stop()
                return
            delay_s = back_off.after(ready_s)
            left = "are lost" if self._settings.store == "memory" else "go on elsewhere, from the store"
            _log.error("%s: its sessions %s; another one is started in %.1f s", why, left, delay_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    async def _once(self, index: int, environment: Mapping[str, str]) -> tuple[float, str]:
        """From the start of a worker to its end: how long it was ready, in seconds, and what became of it."""
        now = asyncio.get_running_loop().time
        try:
            async with running(index, environment) as worker:
                with self._listed(worker):
                    report = await worker.report()
                    if report.metrics_port is not None:
                        self._note_ready(index, worker, report.metrics_port)
                    began = now()
                    status = await worker.wait()
        except OSError as error:
            return 0.0, f"worker {index} cannot be started: {error.strerror}"
        if self._stopping.is_set() and status != 0:
            self._unclean = True
        if report.metrics_port is None:
            return 0.0, report.error or f"worker {index} {describe(status)} while it started"
        return now() - began, f"worker {index} {describe(status)}"

    @contextlib.contextmanager
    def _listed(self, worker: WorkerProcess) -> Iterator[None]:
        self._workers.add(worker)
        if self._stopping.is_set():
            # It was on its way when the others were told.
            self._drain(worker)
        try:
            yield
        finally:
            self._workers.discard(worker)

    def _note_ready(self, index: int, worker: WorkerProcess, metrics_port: int) -> None:
        _log.info(
            "worker %d is ready: process %d, metrics on %s:%d", index, worker.pid, self._settings.host, metrics_port
        )
        self._were_ready.add(index)

    def _drain(self, worker: WorkerProcess) -> None:
        worker.drain(self._settings.drain_s + PATIENCE_S)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT begins to drain, the second kills the workers."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            if not self._stopping.is_set():
                self.stop()
                return
            _log.warning("told to stop again: the workers are killed")
            for worker in self._workers:
                worker.kill()

        for number in _SIGNALS:
            loop.add_signal_handler(number, told)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
