"""Brings models in and out of service while others are served.

Invariants: what takes seconds runs on another thread, and what changes the table runs here; a load that was begun ends
READY or FAILED, whoever still waits for it; a version that is served stays so until another file has passed all checks
that is to take its place.
"""

import asyncio
import dataclasses
import logging

from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.metrics import Metrics
from conveyor_server.repository import Look, ModelVersion, Prepared
from conveyor_server.runner.null import NullRunner
from conveyor_server.servicers.convert import sessions_on
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.departures import Departures
from conveyor_server.servicers.succession import OnNewVersion, Succession

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
        self._succession = Succession(core, on_new_version)
        self._departures = Departures(core, metrics)
        self._loads: set[asyncio.Task[ModelVersion[Engine]]] = set()
        # How the files of each version looked when it was last loaded, whoever asked and whatever came of it.
        self.seen: dict[tuple[str, str], Look] = {}

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

    async def load(self, name: str, version: str = "", *, again: bool = False) -> ModelVersion[Engine]:
        """Loads a version, or the newest in the folder, and returns it READY. One that is READY is left as it is.

        With `again`, one that is READY is loaded anew, and what is in its file now takes its place once it has passed.
        Its sessions stay, move or are closed as the settings say; where it is the same function, nothing changes.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_INVALID, or MODEL_NOT_READY while it is being loaded already.
        """
        version = version or await asyncio.to_thread(self._core.repository.newest_on_disk, name)
        if not self._core.repository.begin(name, version, again=again):
            return self._core.repository.find(name, version)
        return await self._loading(name, version)

    async def unload(self, name: str, version: str, *, force: bool) -> int:
        """Takes a version out of service and returns how many sessions that closed.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY while it loads, or MODEL_IN_USE without `force`.
        """
        repository = self._core.repository
        known = repository.known(name, version)
        leaving = repository.leaving(name, version)
        if known is None and not leaving:
            repository.find(name, version)
        items = leaving if known is None else [*leaving, known]
        sessions = sum(sessions_on(item.engine, self._core.directory) for item in items)
        if sessions and not force:
            raise refuse(
                e.ERROR_REASON_MODEL_IN_USE,
                f"{sessions} sessions are on version {version} of model {name!r}: close them, or unload with force",
                model=name,
                version=version,
                sessions=sessions,
            )
        if known is not None:
            repository.retire(name, version)
        self._metrics.failed(name, version, False)
        closed = await self._departures.close([item for item in items if item.engine is not None])
        _log.info("unloaded %s/%s, %d sessions closed", name, version, closed)
        return closed

    def withdraw(self, name: str, version: str) -> None:
        """A version's file is gone: it takes no new sessions, and goes with the last of those that it has.

        Raises:
            Refused: MODEL_NOT_FOUND, or MODEL_NOT_READY while it is being loaded.
        """
        item = self._core.repository.retire(name, version, leaving=True)
        self.seen.pop((name, version), None)
        self._metrics.failed(name, version, False)
        if item.engine is not None:
            _log.info("%s/%s is served no more: its file is gone", name, version)
            self._succession.withdraw(item)
            self._departures.see_off(item)

    def migrate(self, name: str, source: str = "", target: str = "") -> tuple[int, str]:
        """Moves the sessions of a version, or of all others, to one version; returns how many, and where they are now.

        Args:
            name: the model.
            source: the version that they leave; "": every other one.
            target: the version that they move to; "": the latest that is ready.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY, or MODEL_MISMATCH where inputs, outputs or states differ.
        """
        return self._succession.migrate(name, source, target)

    def stop(self) -> None:
        """The server stops: what leaves is not waited for."""
        self._departures.stop()

    # ------------------------------------------------------------ within

    async def _loading(self, name: str, version: str) -> ModelVersion[Engine]:
        """Loads a version that was begun. A caller that goes away does not stop what others may wait for."""
        load = asyncio.create_task(self._load(name, version))
        self._loads.add(load)
        load.add_done_callback(self._loaded)
        return await asyncio.shield(load)

    async def _load(self, name: str, version: str) -> ModelVersion[Engine]:
        repository = self._core.repository
        try:
            # Before it is opened: what changes meanwhile looks otherwise afterwards.
            look = await asyncio.to_thread(repository.look, name, version)
            if look:
                self.seen[name, version] = look
            prepared = await asyncio.to_thread(repository.prepare, name, version)
        except Refused as refusal:
            repository.fail(name, version, refusal.fault)
            self._metrics.failed(name, version, refusal.fault.reason != e.ERROR_REASON_MODEL_NOT_FOUND)
            raise
        former = repository.ready(name, version)
        if former is not None and _is_same(former.serving.spec, prepared.runner.spec):
            await asyncio.to_thread(prepared.runner.close)
            self._metrics.failed(name, version, False)
            _log.info("%s/%s goes on as it is: its file is the same function", name, version)
            return repository.keep(name, version)
        item = repository.publish(prepared)
        self._core.add(item.serving, prepared.usual_s)
        self._metrics.loaded(item.serving, prepared.load_s)
        self._follow(item, former)
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

    def _follow(self, item: ModelVersion[Engine], former: ModelVersion[Engine] | None) -> None:
        """What becomes of the sessions of whatever a version that is ready follows."""
        if former is None:
            self._succession.succeed(item)
            return
        [leaving] = [other for other in self._core.repository.leaving() if other.engine is former.engine]
        self._succession.replace(leaving, item)
        self._departures.see_off(leaving)

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


def _is_same(one: spec_pb2.ModelSpec, other: spec_pb2.ModelSpec) -> bool:
    """Two files of one function, described alike; when they were made, and by what they were verified, aside."""
    mine, theirs = spec_pb2.ModelSpec(), spec_pb2.ModelSpec()
    for copy, spec in ((mine, one), (theirs, other)):
        copy.CopyFrom(spec)
        for field in ("provenance", "verification", "external_data"):
            copy.ClearField(field)
    return bool(one.digest) and mine == theirs
