"""Requests to models without state: each row of a batch is a step of a session that nobody else uses.

So rows of all requests, whoever sent them, are run together, under the limits and in the metrics of everything else.
The sessions are kept for the next rows, and go when they are idle; they bear the names `MODEL:row:NUMBER`.

Invariants: a request is answered once, with all its rows or with why there are none; a session has one row at a time.
"""

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.inference.job import Job
from conveyor_server.inference.rows import Rows
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Detached, Slept
from conveyor_server.sessions.session import Session
from conveyor_server.transport.seat import NOBODY

# As the number of a stream that holds sessions; those of streams are above 0.
NUMBER = -1
# Helpers that are kept for the next rows: as many as so many of the largest runs take.
_RUNS_KEPT = 2


class Plain:
    """The sessions of models without state, and who holds them. Core thread only.

    Args:
        core: what drives the sessions.
        statistics: counts what is read.
    """

    def __init__(self, core: Core, statistics: Statistics) -> None:
        self._core = core
        self._statistics = statistics
        self._numbers = itertools.count(1)
        self._free: dict[Engine, deque[Session]] = {}
        core.after_removal(self._forget)

    def run(self, job: Job, engine: Engine) -> Rows:
        """Takes a request of a model without state; the core is to be kicked.

        Raises:
            Refused: its tensors cannot be used, or there is no room for its rows; nothing was begun.
            WireError: likewise.
        """
        content = job.read(engine, self._statistics, max_time_steps=self._core.max_time_steps)
        sessions = self._take(engine, content.batch, job.request.model_name)
        rows = Rows(self._core, job, engine, content, sessions, done=self._give_back)
        rows.submit(np.full(content.batch, NUMBER))
        return rows

    def detached(self, event: Detached) -> None:
        """A session is gone, or someone else's; it is not taken again (see `_take`)."""

    def slept(self, event: Slept) -> None:
        """None of them is ever in the store."""

    # ------------------------------------------------------------ within

    def _give_back(self, sessions: Sequence[Session]) -> None:
        """Rows are answered. One large batch does not keep others from sessions until its helpers are idle."""
        for session in sessions:
            free = self._free.get(session.engine)
            if free is None or not self._holds(session):
                continue
            if len(free) < _RUNS_KEPT * session.engine.limits.max_batch:
                free.append(session)
            else:
                self._core.directory.close(session, NOBODY, self._core.now())
                self._core.kick()

    def _holds(self, session: Session) -> bool:
        """It is alive, and nobody else has taken it."""
        held = session.attachment
        return held is not None and held.owner is self and session.closing is None

    def _take(self, engine: Engine, count: int, name: str) -> Sequence[Session]:
        """So many sessions without a row.

        Raises:
            Refused: as Directory.create; none was taken.
        """
        free = self._free.setdefault(engine, deque())
        self._core.directory.admit(max(0, count - len(free)))
        taken: list[Session] = []
        try:
            while len(taken) < count:
                # The last that was used: the others may become idle.
                session = free.pop() if free else self._new(engine, name)
                if self._holds(session):
                    taken.append(session)
        except Refused:
            free.extend(taken)
            raise
        return taken

    def _new(self, engine: Engine, name: str) -> Session:
        directory, now = self._core.directory, self._core.now()
        names = (f"{name}:row:{number}" for number in self._numbers)
        # Somebody may have given his own session such a name.
        free = next(one for one in names if one not in directory.sessions)
        session = directory.create(engine, now, session_id=free, max_in_flight=1)
        directory.attach(session, self, 0, now, number=NUMBER)
        return session

    def _forget(self, engine: Engine) -> None:
        self._free.pop(engine, None)
