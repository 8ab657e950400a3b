"""Takes up what changes in the models' folder: new versions, changed files, folders that are gone.

Invariants: nothing is taken up before two looks in a row found it alike, so what is being written is left alone; a file
that cannot be served is tried again only once it looks otherwise; and whatever is found, what is served goes on until
something better has passed all checks.

It looks again and again, because that works on every file system: those of other machines (NFS), of containers and of
configuration that is mounted tell nobody of changes.
"""

import asyncio
import logging

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.incidents import record
from conveyor_server.repository import Look, Repository
from conveyor_server.servicers.loader import Loader

_log = logging.getLogger("conveyor")


class Watch:
    """Core thread only; the looks themselves are another thread's.

    Args:
        repository: the models.
        loader: loads them.
        every_s: seconds between looks.
    """

    def __init__(self, repository: Repository[Engine], loader: Loader, every_s: float) -> None:
        self._repository = repository
        self._loader = loader
        self._every_s = every_s
        self._before: dict[tuple[str, str], Look] = {}
        # What was said of the folder itself, so that it is said once.
        self._told = ""

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except Exception as error:
                # A defect of ours ends neither the watch nor the server.
                record("the watch of the models' folder failed, and goes on", error)

    async def look(self) -> None:
        """Looks once, and takes up what was found like this before; one version after the other."""
        found = await self._look()
        if found is None:
            return
        before, self._before = self._before, found
        seen = self._loader.seen
        for name, version in sorted(found, key=lambda key: (key[0], int(key[1]))):
            key = name, version
            if found[key] == before.get(key) and found[key] != seen.get(key):
                await self._load(name, version)
        # Afterwards, so that sessions have a newer version to move to.
        for name, version in sorted(set(seen) - set(found) - set(before)):
            if await asyncio.to_thread(self._repository.is_gone, name, version):
                self._withdraw(name, version)

    async def _look(self) -> dict[tuple[str, str], Look] | None:
        """What is there; None: the folder cannot be judged, and nothing is done."""
        try:
            found = await asyncio.to_thread(self._repository.looks)
        except OSError as error:
            self._say(f"the models' folder cannot be read ({error.strerror}): what is served goes on")
            return None
        if not found and self._loader.seen:
            # Somebody took all models away, or a mount: who means it unloads them.
            self._say("the models' folder is empty: what is served goes on; UnloadModel ends it")
            return None
        self._say("")
        return found

    async def _load(self, name: str, version: str) -> None:
        try:
            await self._loader.load(name, version, again=True)
        except Refused as refusal:
            _log.error("%s", refusal.fault.message)
            if self._repository.ready(name, version) is not None:
                _log.warning("%s/%s goes on with its former file", name, version)

    def _withdraw(self, name: str, version: str) -> None:
        if self._repository.known(name, version) is None:
            # Unloaded before.
            self._loader.seen.pop((name, version))
            return
        try:
            self._loader.withdraw(name, version)
        except Refused as refusal:
            # It is being loaded: with the next look.
            _log.debug("%s", refusal.fault.message)

    def _say(self, what: str) -> None:
        if what and what != self._told:
            _log.warning("%s", what)
        self._told = what
