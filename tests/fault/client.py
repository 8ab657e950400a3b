"""One client process: half of a script's sessions, through the public SDK alone, and a log of all that they are handed.

Invariant: a line is written for each answer when the app has it in hand, and for whatever goes wrong; what nobody wrote
down did not happen. Faults are none of its business: it retries nothing.

    python -m tests.fault.client SETTINGS INDEX TARGET FOLDER
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import conveyor.aio
import numpy as np

from tests.fault.model import NAME, digest, given
from tests.fault.script import IDLE_S, Role, Script, Settings

_CONNECTIONS = 3
_STREAMS = 2
_PATIENCE_S = 120.0
_LOOK_S = 0.05
# What a session left for the next process is called in the folder.
HANDED, BEGUN = "handed", "begun"


class Journal:
    """The log. Each line goes to the file at once."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink

    def write(self, session: str, **told: Any) -> None:
        """Adds a line about a session, with the time on the clock of the machine."""
        self._sink.write(json.dumps({"session": session, **told, "at": round(time.monotonic(), 6)}) + "\n")
        self._sink.flush()


class App:
    """What one process does.

    Args:
        script: of all processes.
        index: which process this is.
        folder: where the log goes, and where processes leave sessions for each other.
    """

    def __init__(self, script: Script, index: int, folder: Path, journal: Journal) -> None:
        self._script = script
        self._index = index
        self._folder = folder
        self._journal = journal
        self._handed: dict[str, asyncio.Event] = {}
        self._to_begin: set[str] = set()

    async def run(self, target: str) -> None:
        """Plays all roles of this process, each in a task of its own."""
        (self._folder / HANDED).mkdir(exist_ok=True)
        legs = [(role, *leg) for role in self._script.roles for leg in role.legs(self._index)]
        self._handed = {role.name: asyncio.Event() for role, after, _ in legs if after}
        self._to_begin = {role.name for role, after, _ in legs if not after}
        looking = asyncio.create_task(self._look())
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(_connect(target)) for _ in range(_CONNECTIONS)]
            async with asyncio.TaskGroup() as group:
                for number, (role, after, up_to) in enumerate(legs):
                    group.create_task(self._play(clients[number % _CONNECTIONS], role, after, up_to))
            looking.cancel()

    async def _play(self, client: conveyor.aio.AsyncClient, role: Role, after: int, up_to: int) -> None:
        """One role's steps after `after`, up to `up_to`."""
        if after:
            await self._handed[role.name].wait()
        try:
            async with self._opened(client, role, after, up_to) as opened:
                self._begun(role)
                play = self._pipelined if role.pipelined else self._one_by_one
                await play(opened, role, after, up_to)
        except Exception as error:
            for session in role.ids:
                self._journal.write(session, trouble=f"after step {after}: {error!r}")
            self._begun(role)
        if up_to < len(role.lengths):
            # Whatever became of it, the other process is not left waiting.
            (self._folder / HANDED / role.name).touch()

    @contextlib.asynccontextmanager
    async def _opened(self, client: conveyor.aio.AsyncClient, role: Role, after: int, up_to: int) -> AsyncIterator[Any]:
        """The role's session or population; closed at the end, or detached where another process goes on with it."""
        options: dict[str, Any] = {"resume": after > 0, "detach_on_exit": up_to < len(role.lengths)}
        if self._script.settings.durable:
            options["durability"] = role.durability
        opening: Any
        if role.is_population:
            opening = client.population(NAME, session_ids=role.ids, **options)
        else:
            opening = client.session(NAME, session_id=role.name, own_stream=role.own_stream, **options)
        async with opening as opened:
            applied = np.atleast_1d(opened.applied_seq).tolist()
            if applied != [after] * len(role.ids):
                raise AssertionError(f"opened at steps {applied}, and {after} answers were handed out")
            yield opened

    async def _one_by_one(self, opened: Any, role: Role, after: int, up_to: int) -> None:
        for step in range(after + 1, up_to + 1):
            await self._pause(role, step)
            asked_at = time.monotonic()
            self._hand_out(role, step, await opened.step(self._inputs(role, step)), asked_at)
            if step in role.flush_at:
                await opened.flush()

    async def _pipelined(self, opened: Any, role: Role, after: int, up_to: int) -> None:
        asked_at: dict[int, float] = {}

        async def inputs() -> AsyncIterator[Any]:
            for step in range(after + 1, up_to + 1):
                await self._pause(role, step)
                asked_at[step] = time.monotonic()
                yield self._inputs(role, step)

        step = after
        async for answer in opened.stream(inputs()):
            step += 1
            self._hand_out(role, step, answer, asked_at.pop(step))
            if step in role.flush_at:
                await opened.flush()

    async def _pause(self, role: Role, step: int) -> None:
        pause_s = role.pauses_s[step - 1]
        if pause_s >= IDLE_S[0]:
            for session in role.ids:
                self._journal.write(session, note="pauses", pause_s=pause_s)
        await asyncio.sleep(pause_s)

    def _inputs(self, role: Role, step: int) -> Any:
        """What `step` takes: a chunk, and for a population one of each row."""
        chunks = [given(self._script.seed, session, step, role.lengths[step - 1]) for session in role.ids]
        return np.stack(chunks) if role.is_population else chunks[0]

    def _hand_out(self, role: Role, step: int, outputs: Any, asked_at: float) -> None:
        rows = outputs if role.is_population else [outputs]
        for session, row in zip(role.ids, rows, strict=True):
            x = given(self._script.seed, session, step, role.lengths[step - 1])
            output = np.ascontiguousarray(row).tobytes().hex()
            self._journal.write(session, answer=step, input=digest(x), output=output, asked_at=round(asked_at, 6))

    def _begun(self, role: Role) -> None:
        """Whoever watches is told once everything has begun, or has failed to."""
        self._to_begin.discard(role.name)
        if not self._to_begin:
            (self._folder / f"{BEGUN}-{self._index}").touch()

    async def _look(self) -> None:
        """Sees what was handed over."""
        while True:
            for path in (self._folder / HANDED).iterdir():
                if path.name in self._handed:
                    self._handed[path.name].set()
            await asyncio.sleep(_LOOK_S)


def _connect(target: str) -> conveyor.aio.AsyncClient:
    return conveyor.aio.connect(
        target,
        timeout_s=_PATIENCE_S,
        connect_timeout_s=_PATIENCE_S,
        resume_timeout_s=_PATIENCE_S,
        streams_per_client=_STREAMS,
    )


def main(arguments: Sequence[str]) -> None:
    """Plays one process's part of a script."""
    settings, index, target, folder = arguments
    path = Path(folder) / f"client-{index}.jsonl"
    with path.open("w", encoding="utf-8") as sink:
        app = App(Script(Settings.from_json(settings)), int(index), Path(folder), Journal(sink))
        asyncio.run(app.run(target))


if __name__ == "__main__":
    main(sys.argv[1:])
