"""Engines that leave: taken out once nobody is on them.

Invariant: an engine's runner is closed only when no session is on it, awake or asleep on a stream, and it has nothing
left to run.
"""

import asyncio
import logging
from collections.abc import Sequence

from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.metrics import Metrics
from conveyor_server.repository import ModelVersion
from conveyor_server.servicers.core import Core

# How often one that leaves is looked at. Twice nobody, and it goes: a session may be on its way in from the store.
LOOK_S = 1.0
_Version = ModelVersion[Engine]
_log = logging.getLogger("conveyor")


class Departures:
    """Core thread only."""

    def __init__(self, core: Core, metrics: Metrics) -> None:
        self._core = core
        self._metrics = metrics
        self._tasks: dict[Engine, asyncio.Task[None]] = {}

    def see_off(self, item: _Version) -> None:
        """Takes a version that is LEAVING out when the last of its sessions has gone."""
        engine = item.serving
        task = self._tasks[engine] = asyncio.create_task(self._see_off(item))
        task.add_done_callback(lambda _: self._tasks.pop(engine, None))

    async def close(self, items: Sequence[_Version]) -> int:
        """Closes the sessions of versions that are out of the table, takes them out, and says how many there were."""
        closed = 0
        for item in items:
            task = self._tasks.pop(item.serving, None)
            if task is not None:
                task.cancel()
                self._core.repository.gone(item)
            closed += self._close_all(item.serving)
        self._core.kick()
        for item in items:
            await asyncio.shield(self._take_out(item.serving))
        return closed

    def stop(self) -> None:
        """Nobody is waited for any more; what is LEAVING is closed with the server."""
        for task in self._tasks.values():
            task.cancel()

    async def _see_off(self, item: _Version) -> None:
        engine = item.serving
        quiet = 0
        while quiet < 2:
            await asyncio.sleep(LOOK_S)
            quiet = 0 if self._is_used(engine) else quiet + 1
        self._core.repository.gone(item)
        del self._tasks[engine]
        # For what the directory keeps of an engine beside its sessions.
        self._close_all(engine)
        await self._take_out(engine)
        _log.info("unloaded the former %s/%s, its last session has gone", item.name, item.version)

    def _is_used(self, engine: Engine) -> bool:
        directory = self._core.directory
        several = (*directory.sessions.values(), *directory.asleep.values())
        return any(session.engine is engine for session in several)

    def _close_all(self, engine: Engine) -> int:
        return self._core.directory.close_all(engine, session_pb2.DETACH_CAUSE_MODEL_UNLOADED, self._core.now())

    async def _take_out(self, engine: Engine) -> None:
        await self._core.remove(engine)
        self._metrics.unloaded(engine)
        await asyncio.to_thread(engine.runner.close)
