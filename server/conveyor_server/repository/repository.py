"""The versions that this server knows, and what became of each.

Invariant: a version is LOADING, READY or FAILED; only a READY one has an engine, and it keeps it until it is retired or
another takes its place, which it does in one step. What left the table may go on with the sessions that it has, and
takes no new ones. What happens to one version changes no other. The table belongs to the core thread; `prepare` is for
any other.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, spec_pb2

from conveyor_server.errors import Refused, refuse
from conveyor_server.repository.folder import MODEL_FILE, Look, ModelFolder, is_name, is_version
from conveyor_server.repository.policy import Overrides
from conveyor_server.repository.prepare import Prepared, prepare
from conveyor_server.repository.vectors import NotAsVerified
from conveyor_server.runner.base import RunFailed, Runner, RunnerUnavailable

EngineT = TypeVar("EngineT")

# Loading takes seconds; asking again sooner brings nothing.
_LOADING_RETRY_S = 1.0
# What a caller sent comes back in a refusal only this far.
_MAX_ECHO = 128
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelVersion(Generic[EngineT]):
    """One version of a model, as it is now.

    Attributes:
        name: repository name.
        version: repository version.
        status: LOADING, READY, FAILED or LEAVING of model.proto's ModelStatus.
        failure: why it could not be loaded; set where FAILED. Where READY: why what was put in its place is not served.
        prepared: the runner and the figures of loading; set where READY or LEAVING.
        engine: what `make_engine` made; set where READY or LEAVING.
    """

    name: str
    version: str
    status: model_pb2.ModelStatus.ValueType
    failure: Fault | None = None
    prepared: Prepared | None = None
    engine: EngineT | None = None

    @property
    def spec(self) -> spec_pb2.ModelSpec | None:
        """The model's description where READY or LEAVING, with the repository's name for it."""
        if self.prepared is None:
            return None
        spec = spec_pb2.ModelSpec()
        spec.CopyFrom(self.prepared.runner.spec)
        spec.name = self.name
        return spec

    @property
    def serving(self) -> EngineT:
        """The engine of a READY version; Refused (MODEL_NOT_READY or the failure) otherwise."""
        if self.engine is not None:
            return self.engine
        if self.failure is not None:
            raise Refused(self.failure)
        raise _loading(self.name, self.version)


class Repository(Generic[EngineT]):
    """Versions by name. Core thread only, but for `on_disk` and `prepare`.

    To load: `begin` on the core thread, `prepare` on another, then `publish` or `fail` on the core thread again.

    Args:
        root: folder of `NAME/VERSION/model.onnx`.
        open_runner: opens a file; called by `prepare`, on its thread.
        make_engine: makes the engine of a prepared version; called by `publish`, on the core thread.
        overrides: what is given of every model's batch policy.
    """

    def __init__(
        self,
        root: Path,
        *,
        open_runner: Callable[[Path], Runner],
        make_engine: Callable[[Prepared], EngineT],
        overrides: Overrides | None = None,
    ) -> None:
        self._folder = ModelFolder(root)
        self._open_runner = open_runner
        self._make_engine = make_engine
        self._overrides = overrides
        self._versions: dict[str, dict[str, ModelVersion[EngineT]]] = {}
        # Being loaded: those that are LOADING, and READY ones whose file is loaded anew.
        self._begun: set[tuple[str, str]] = set()
        self._leaving: list[ModelVersion[EngineT]] = []

    def on_disk(self) -> dict[str, list[str]]:
        """Names in the folder with their versions, newest last. Any thread.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._folder.scan()

    def look(self, name: str, version: str) -> Look:
        """How the files of a version look now; empty: there are none. Any thread."""
        return self._folder.look(name, version)

    def is_gone(self, name: str, version: str) -> bool:
        """The folder has no file of that version any more, for certain. Any thread."""
        return self._folder.is_gone(name, version)

    def looks(self) -> dict[tuple[str, str], Look]:
        """How every version in the folder looks now. Any thread.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._folder.looks()

    def newest_on_disk(self, name: str) -> str:
        """The highest version of a model in the folder. Any thread.

        Raises:
            Refused: MODEL_NOT_FOUND.
        """
        versions = self._folder.versions(name)
        if not versions:
            raise self._not_on_disk(name, "")
        return versions[-1]

    def prepare(self, name: str, version: str) -> Prepared:
        """Opens, warms and measures a version, in seconds. Any thread but the core's; nothing in the table changes.

        Raises:
            Refused: MODEL_NOT_FOUND, where the folder has no such file; MODEL_INVALID, where it cannot be served.
        """
        path = self._folder.path(name, version)
        if path is None:
            raise self._not_on_disk(name, version)
        try:
            return prepare(name, version, path, self._open_runner, self._overrides)
        except RunnerUnavailable as error:
            raise _invalid(name, version, str(error)) from error
        except NotAsVerified as error:
            why = f"it computes something else here than it was verified to compute: {error.miss}"
            raise _invalid(
                name, version, why, tensor=error.miss.tensor, difference=f"{error.miss.difference:.3g}"
            ) from error
        except RunFailed as error:
            raise _invalid(name, version, f"it loads, and its first run fails: {error}") from error
        except Exception as error:
            # Whatever a file makes our libraries do, the other models go on.
            _log.exception("model %s/%s could not be prepared", name, version)
            raise _invalid(name, version, f"loading it failed unexpectedly ({type(error).__name__})") from error

    def begin(self, name: str, version: str, *, again: bool = False) -> bool:
        """Marks a version as LOADING. False: it is READY already and is left as it is.

        With `again`, one that is READY is to be loaded anew, and stays READY meanwhile.

        Raises:
            Refused: MODEL_NOT_READY, where it is being loaded already; MODEL_NOT_FOUND for what cannot be a version.
        """
        if not (is_name(name) and is_version(version)):
            raise self._not_found(name, version)
        if (name, version) in self._begun:
            raise _loading(name, version)
        is_ready = self.ready(name, version) is not None
        if is_ready and not again:
            return False
        self._begun.add((name, version))
        if not is_ready:
            self._put(ModelVersion(name, version, model_pb2.MODEL_STATUS_LOADING))
        return True

    def publish(self, prepared: Prepared) -> ModelVersion[EngineT]:
        """Makes the engine of a version that `begin` marked; from here on `find` gives it.

        One that was READY is LEAVING from here on.
        """
        self._end(prepared.name, prepared.version)
        engine = self._make_engine(prepared)
        former = self.ready(prepared.name, prepared.version)
        if former is not None:
            self._leave(former)
        return self._put(
            ModelVersion(
                prepared.name, prepared.version, model_pb2.MODEL_STATUS_READY, prepared=prepared, engine=engine
            )
        )

    def fail(self, name: str, version: str, fault: Fault) -> None:
        """Records why a version that `begin` marked is not served. One that is not on disk is forgotten.

        One that was READY stays so, with the failure beside it.
        """
        self._end(name, version)
        former = self.ready(name, version)
        if former is not None:
            self._put(replace(former, failure=fault))
        elif fault.reason == e.ERROR_REASON_MODEL_NOT_FOUND:
            self._remove(name, version)
        else:
            self._put(ModelVersion(name, version, model_pb2.MODEL_STATUS_FAILED, failure=fault))

    def keep(self, name: str, version: str) -> ModelVersion[EngineT]:
        """Ends what `begin` marked of a READY version: it stays, and the file that is there now is its own."""
        self._end(name, version)
        former = self.ready(name, version)
        if former is None:
            raise AssertionError(f"{name}/{version} is not there to be kept")
        return self._put(replace(former, failure=None))

    def retire(self, name: str, version: str, *, leaving: bool = False) -> ModelVersion[EngineT]:
        """Forgets a READY or FAILED version and returns what it was; closing its runner is the caller's.

        With `leaving`, one that was READY goes on with the sessions that it has, and is returned as that.

        Raises:
            Refused: MODEL_NOT_FOUND; MODEL_NOT_READY while it is loading.
        """
        known = self._versions.get(name, {}).get(version)
        if known is None:
            raise self._not_found(name, version)
        if (name, version) in self._begun:
            raise _loading(name, version)
        self._remove(name, version)
        return self._leave(known) if leaving and known.engine is not None else known

    def known(self, name: str, version: str) -> ModelVersion[EngineT] | None:
        """The version, LOADING, READY or FAILED; None: there is none."""
        return self._versions.get(name, {}).get(version)

    def ready(self, name: str, version: str) -> ModelVersion[EngineT] | None:
        """The version if it is READY."""
        known = self.known(name, version)
        return known if known is not None and known.engine is not None else None

    def leaving(self, name: str = "", version: str = "") -> list[ModelVersion[EngineT]]:
        """What goes on with the sessions that it has: of a version, of a model, or of all."""
        return [item for item in self._leaving if name in {"", item.name} and version in {"", item.version}]

    def gone(self, item: ModelVersion[EngineT]) -> None:
        """What was LEAVING has left; closing its runner is the caller's."""
        self._leaving.remove(item)

    def with_digest(self, name: str, version: str, digest: str) -> ModelVersion[EngineT] | None:
        """What has that function, of what is READY or LEAVING; with an empty `version`, of any version."""
        found = [
            item
            for item in (*self._leaving, *self.versions())
            if item.name == name
            and version in {"", item.version}
            and item.prepared is not None
            and item.prepared.runner.spec.digest == digest
        ]
        return found[-1] if found else None

    def find(self, name: str, version: str = "", uses: Callable[[str], bool] = lambda _: True) -> ModelVersion[EngineT]:
        """A version, or with an empty `version` the latest: the highest that is READY.

        Without a READY one, the latest is the highest of those that are LOADING, else of those that FAILED, so that
        `find(name).serving` says why there is nothing to serve.

        Args:
            name: of the model.
            version: of it.
            uses: which models are there for whoever asks.

        Raises:
            Refused: MODEL_NOT_FOUND.
        """
        versions = self._versions.get(name, {}) if uses(name) else {}
        if version:
            if version not in versions:
                raise self._not_found(name, version, uses)
            return versions[version]
        for status in (model_pb2.MODEL_STATUS_READY, model_pb2.MODEL_STATUS_LOADING, model_pb2.MODEL_STATUS_FAILED):
            having = [item for item in versions.values() if item.status == status]
            if having:
                return max(having, key=_number)
        raise self._not_found(name, "", uses)

    def versions(self) -> list[ModelVersion[EngineT]]:
        """Every version that is known, by name, newest last."""
        return [item for name in sorted(self._versions) for item in sorted(self._versions[name].values(), key=_number)]

    def is_latest(self, item: ModelVersion[EngineT]) -> bool:
        """True where new sessions that name no version get this one."""
        ready = [other for other in self._versions.get(item.name, {}).values() if other.engine is not None]
        return bool(ready) and max(ready, key=_number) is item

    def _put(self, item: ModelVersion[EngineT]) -> ModelVersion[EngineT]:
        self._versions.setdefault(item.name, {})[item.version] = item
        return item

    def _remove(self, name: str, version: str) -> None:
        del self._versions[name][version]
        if not self._versions[name]:
            del self._versions[name]

    def _leave(self, item: ModelVersion[EngineT]) -> ModelVersion[EngineT]:
        leaving = replace(item, status=model_pb2.MODEL_STATUS_LEAVING, failure=None)
        self._leaving.append(leaving)
        return leaving

    def _end(self, name: str, version: str) -> None:
        if (name, version) not in self._begun:
            raise AssertionError(f"{name}/{version} was not begun")
        self._begun.remove((name, version))

    def _not_found(self, name: str, version: str, uses: Callable[[str], bool] = lambda _: True) -> Refused:
        ready = [item for item in self.versions() if item.engine is not None and uses(item.name)]
        return _missing("is served here", name, version, [f"{item.name}/{item.version}" for item in ready])

    def _not_on_disk(self, name: str, version: str) -> Refused:
        found = self._folder.versions(name)
        return _missing(
            f"is in the model folder as NAME/VERSION/{MODEL_FILE}", name, version, [f"{name}/{item}" for item in found]
        )


def _number(item: ModelVersion[EngineT]) -> int:
    return int(item.version)


def _loading(name: str, version: str) -> Refused:
    return refuse(
        e.ERROR_REASON_MODEL_NOT_READY,
        f"version {version} of model {name!r} is loading: try again in a moment",
        retry_s=_LOADING_RETRY_S,
        model=name,
    )


def _missing(where: str, name: str, version: str, available: Sequence[str]) -> Refused:
    name, version = name[:_MAX_ECHO], version[:_MAX_ECHO]
    what = f"version {version} of model {name!r}" if version else f"model {name!r}"
    listed = ", ".join(available)
    return refuse(
        e.ERROR_REASON_MODEL_NOT_FOUND,
        f"no {what} {where}; available: {listed or 'none'}",
        model=name,
        version=version,
        available=listed,
    )


def _invalid(name: str, version: str, why: str, **metadata: str) -> Refused:
    message = f"version {version} of model {name!r} cannot be served: {why}"
    return refuse(e.ERROR_REASON_MODEL_INVALID, message, retry_s=None, model=name, version=version, **metadata)
