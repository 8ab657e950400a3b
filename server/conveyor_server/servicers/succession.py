"""What becomes of the sessions of a version that another one follows, or whose file is gone: the policy.

Invariant: a session is moved only to a version of equal inputs, outputs and states; one that cannot be moved stays
where it is, and that lives as long as the last of them.
"""

import logging
from typing import Literal, TypeAlias

from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.repository import ModelVersion
from conveyor_server.servicers.convert import sessions_on
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.migration import difference
from conveyor_server.sessions.session import DetachCause

OnNewVersion: TypeAlias = Literal["pin", "migrate", "close"]
_Version: TypeAlias = ModelVersion[Engine]
_log = logging.getLogger("conveyor")


class Succession:
    """Core thread only."""

    def __init__(self, core: Core, policy: OnNewVersion) -> None:
        self._core = core
        self._policy = policy

    def migrate(self, name: str, source: str = "", target: str = "") -> tuple[int, str]:
        """See Loader.migrate."""
        repository = self._core.repository
        to = repository.find(name, target)
        _ = to.serving
        if source and not repository.leaving(name, source):
            repository.find(name, source)
        moved = 0
        for item in (*repository.versions(), *repository.leaving()):
            if item.name != name or item is to or source not in {"", item.version} or item.engine is None:
                continue
            what = difference(item.engine.spec, to.serving.spec)
            if what and source:
                raise _mismatch(item, to, what)
            moved += self._move(item, to)
        self._core.kick()
        if moved:
            _log.info("%d sessions of %s move to version %s", moved, name, to.version)
        return moved, to.version

    def succeed(self, item: _Version) -> None:
        """A version is ready that was not there: what becomes of the sessions of older ones."""
        repository = self._core.repository
        if self._policy == "pin" or not repository.is_latest(item):
            return
        if self._policy == "migrate":
            self.migrate(item.name, "", item.version)
            return
        for other in repository.versions():
            if other.name == item.name and other.version != item.version and other.engine is not None:
                self._close(other.engine, session_pb2.DETACH_CAUSE_SUPERSEDED)
        self._core.kick()

    def replace(self, former: _Version, item: _Version) -> None:
        """A version's file has taken the place of its former one, which is LEAVING.

        Sessions move where both are the same function, whatever the policy.
        """
        if self._policy == "close":
            self._close(former.serving, session_pb2.DETACH_CAUSE_SUPERSEDED)
        elif self._policy == "migrate" or former.serving.spec.digest == item.serving.spec.digest:
            self._move(former, item)
        if self._core.store is not None and difference(former.serving.spec, item.serving.spec):
            self._core.store.keeper.revival.stay(item.name, item.version)
        self._core.kick()
        self._tell_who_stays(former, "another file is served as that version")

    def withdraw(self, former: _Version) -> None:
        """A version's file is gone, and it is LEAVING."""
        repository = self._core.repository
        if self._policy == "close":
            self._close(former.serving, session_pb2.DETACH_CAUSE_MODEL_UNLOADED)
        elif self._policy == "migrate":
            others = [other for other in repository.versions() if other.name == former.name]
            latest = next((other for other in others if repository.is_latest(other)), None)
            if latest is not None:
                self._move(former, latest)
        self._core.kick()
        self._tell_who_stays(former, "its file is gone")

    # ------------------------------------------------------------ within

    def _move(self, item: _Version, to: _Version) -> int:
        """How many sessions move; none where they cannot."""
        what = difference(item.serving.spec, to.serving.spec)
        if what:
            _log.warning("sessions stay on %s/%s: version %s has other %s", item.name, item.version, to.version, what)
            return 0
        moved = self._core.directory.migrate(item.serving, to.serving)
        if self._core.store is not None:
            self._core.store.keeper.revival.move(item.name, item.version, to.version)
        return moved

    def _close(self, engine: Engine, cause: DetachCause) -> None:
        self._core.directory.close_all(engine, cause, self._core.now())

    def _tell_who_stays(self, former: _Version, why: str) -> None:
        count = sessions_on(former.engine, self._core.directory)
        if count and self._policy == "pin":
            _log.info("%d sessions stay with the former %s/%s (%s)", count, former.name, former.version, why)


def _mismatch(source: _Version, target: _Version, what: str) -> Refused:
    return refuse(
        e.ERROR_REASON_MODEL_MISMATCH,
        f"sessions of {source.name} version {source.version} cannot go on with version {target.version}, which has "
        f"other {what}: let them end, or close them",
        model=target.name,
        version=target.version,
        digest=target.serving.spec.digest,
    )
