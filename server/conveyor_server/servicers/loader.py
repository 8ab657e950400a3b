"""Brings models in and out of service while others are served.

Invariants: what takes seconds runs on another thread, and what changes the table runs here; a load that was begun ends
READY or FAILED, whoever still waits for it; a runner is closed only when its engine has nothing left to run.
"""

import asyncio
import dataclasses
import logging
from typing import Literal, TypeAlias

from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.metrics import Metrics
from conveyor_server.repository import ModelVersion, Prepared
from conveyor_server.runner.null import NullRunner
from conveyor_server.servicers.convert import sessions_on
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.migration import difference

OnNewVersion: TypeAlias = Literal["pin", "migrate", "close"]
_UNCHECKED = "not checked here, because its file holds no verifier vectors"
_log = logging.getLogger("conveyor")


class Loader:
    """Loads and unloads versions. Core thread only."""

    def __init__(
        self, core: Core, metrics: Metrics, *, diagnostics: bool = False, on_new_version: OnNewVersion = "pin"
    ) -> None:
        self._core = core
        self._metrics = metrics
        self._diagnostics = diagnostics
        self._on_new_version = on_new_version
        self._loads: set[asyncio.Task[ModelVersion[Engine]]] = set()

    async def load_all(self) -> None:
        """Loads every version in the folder, one after the other; those that cannot be served are logged.

        Raises:
            OSError: the folder cannot be read.
        """
        on_disk = await asyncio.to_thread(self._core.repository.on_disk)
        versions = [(name, version) for name, numbers in on_disk.items() for version in numbers]
        # All at first, so that whoever asks for one that is not there yet is told to come again.
        begun = [item for item in versions if self._core.repository.begin(*item)]
        for name, version in begun:
            try:
                await self._loading(name, version)
            except Refused as refusal:
                _log.error("%s", refusal.fault.message)

    async def load(self, name: str, version: str = "") -> ModelVersion[Engine]:
        """Loads a version, or the newest in the folder, and returns it READY. One that is READY is left as it is.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_INVALID, or MODEL_NOT_READY while it is being loaded already.
        """
        version = version or await asyncio.to_thread(self._core.repository.newest_on_disk, name)
        if not self._core.repository.begin(name, version):
            return self._core.repository.find(name, version)
        return await self._loading(name, version)

    async def unload(self, name: str, version: str, *, force: bool) -> int:
        """Takes a version out of service and returns how many sessions that closed.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY while it loads, or MODEL_IN_USE without `force`.
        """
        repository, directory = self._core.repository, self._core.directory
        engine = repository.find(name, version).engine
        sessions = sessions_on(engine, directory)
        if sessions and not force:
            raise refuse(
                e.ERROR_REASON_MODEL_IN_USE,
                f"{sessions} sessions are on version {version} of model {name!r}: close them, or unload with force",
                model=name,
                version=version,
                sessions=sessions,
            )
        repository.retire(name, version)
        if engine is None:
            self._metrics.failed(name, version, False)
            return 0
        closed = directory.close_all(engine, session_pb2.DETACH_CAUSE_MODEL_UNLOADED, self._core.now())
        self._core.kick()
        await asyncio.shield(self._take_out(engine))
        _log.info("unloaded %s/%s, %d sessions closed", name, version, closed)
        return closed

    def migrate(self, name: str, source: str = "", target: str = "") -> tuple[int, str]:
        """Moves the sessions of a version, or of all others, to one version; returns how many, and where they are now.

        Args:
            name: the model.
            source: the version that they leave; "": every other one.
            target: the version that they move to; "": the latest that is ready.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY, or MODEL_MISMATCH where inputs, outputs or states differ.
        """
        repository, directory, store = self._core.repository, self._core.directory, self._core.store
        to = repository.find(name, target)
        engine = to.serving
        if source:
            repository.find(name, source)
        leave = [
            item
            for item in repository.versions()
            if item.name == name and item.version != to.version and source in {"", item.version}
        ]
        moved = 0
        for item in leave:
            if item.engine is None:
                continue
            what = difference(item.engine.spec, engine.spec)
            if what and source:
                raise _mismatch(item, to, what)
            if what:
                _log.warning("sessions stay on %s/%s: version %s has other %s", name, item.version, to.version, what)
                continue
            moved += directory.migrate(item.engine, engine)
            if store is not None:
                store.keeper.revival.move(name, item.version, to.version)
        self._core.kick()
        if moved:
            _log.info("%d sessions of %s move to version %s", moved, name, to.version)
        return moved, to.version

    def _succeed(self, item: ModelVersion[Engine]) -> None:
        """A version is ready: what becomes of the sessions of older ones."""
        repository, directory = self._core.repository, self._core.directory
        if self._on_new_version == "pin" or not repository.is_latest(item):
            return
        if self._on_new_version == "migrate":
            self.migrate(item.name, "", item.version)
            return
        for other in repository.versions():
            if other.name == item.name and other.version != item.version and other.engine is not None:
                directory.close_all(other.engine, session_pb2.DETACH_CAUSE_SUPERSEDED, self._core.now())
        self._core.kick()

    async def _take_out(self, engine: Engine) -> None:
        await self._core.remove(engine)
        self._metrics.unloaded(engine)
        await asyncio.to_thread(engine.runner.close)

    async def _loading(self, name: str, version: str) -> ModelVersion[Engine]:
        """Loads a version that was begun. A caller that goes away does not stop what others may wait for."""
        load = asyncio.create_task(self._load(name, version))
        self._loads.add(load)
        load.add_done_callback(self._loaded)
        return await asyncio.shield(load)

    async def _load(self, name: str, version: str) -> ModelVersion[Engine]:
        repository = self._core.repository
        try:
            prepared = await asyncio.to_thread(repository.prepare, name, version)
        except Refused as refusal:
            repository.fail(name, version, refusal.fault)
            self._metrics.failed(name, version, refusal.fault.reason != e.ERROR_REASON_MODEL_NOT_FOUND)
            raise
        item = repository.publish(prepared)
        self._core.add(item.serving, prepared.usual_s)
        self._metrics.loaded(item.serving, prepared.load_s)
        self._succeed(item)
        if self._diagnostics:
            self._publish_null(prepared)
        _log.info(
            "serving %s/%s on %s: %d bytes of state a session, %.0f us for one step of one, %s; %s; loaded in %.2f s",
            name,
            version,
            prepared.runner.device,
            prepared.runner.spec.state_bytes,
            prepared.step_s[(1, 1)] * 1e6,
            prepared.policy,
            f"checked by {prepared.checked} verifier vectors" if prepared.checked else _UNCHECKED,
            prepared.load_s,
        )
        return item

    def _publish_null(self, prepared: Prepared) -> None:
        """Serves a twin of a model that runs nothing, under `NAME.null`."""
        name, runner = f"{prepared.name}.null", prepared.runner
        if self._core.repository.begin(name, prepared.version):
            twin = dataclasses.replace(prepared, name=name, runner=NullRunner(runner.spec, runner.capacity))
            item = self._core.repository.publish(twin)
            self._core.add(item.serving, dict.fromkeys(prepared.usual_s, 0.0))
            self._metrics.loaded(item.serving, 0.0)

    def _loaded(self, load: "asyncio.Task[ModelVersion[Engine]]") -> None:
        self._loads.discard(load)
        if not load.cancelled():
            # Retrieved: a refusal was recorded in the table, and whoever still waits is told.
            load.exception()


def _mismatch(source: ModelVersion[Engine], target: ModelVersion[Engine], what: str) -> Refused:
    return refuse(
        e.ERROR_REASON_MODEL_MISMATCH,
        f"sessions of {source.name} version {source.version} cannot go on with version {target.version}, which has "
        f"other {what}: let them end, or close them",
        model=target.name,
        version=target.version,
        digest=target.serving.spec.digest,
    )
