"""Requests to models without state: each row of a batch is a step of a session that nobody else uses.

So rows of all requests, whoever sent them, are run together, under the limits and in the metrics of everything else.
The sessions are kept for the next rows, and go when they are idle; they bear the names `MODEL:row:NUMBER`.

Invariants: a request is answered once, with all its rows or with why there are none; a session has one row at a time.
"""

import itertools
from collections import deque
from collections.abc import Sequence

from conveyor_proto.codec import Array
from conveyor_proto.fingerprint import fingerprint
from conveyor_proto.reasons import Fault

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.inference.answers import respond
from conveyor_server.inference.job import Job, take_back
from conveyor_server.inference.requests import Content
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Answer, Closed
from conveyor_server.sessions.session import Session, Submission


class Plain:
    """The sessions of models without state. Core thread only."""

    def __init__(self, core: Core, statistics: Statistics) -> None:
        self.core = core
        self._statistics = statistics
        self._numbers = itertools.count(1)
        self._free: dict[Engine, deque[Session]] = {}
        core.after_removal(self._forget)

    def run(self, job: Job, engine: Engine) -> "Rows":
        """Takes a request of a model without state; the core is to be kicked.

        Raises:
            Refused: its tensors cannot be used, or there is no room for its rows; nothing was begun.
            WireError: likewise.
        """
        content = job.read(engine, self._statistics, max_time_steps=self.core.max_time_steps)
        sessions = self._take(engine, len(content.rows), job.request.model_name)
        return Rows(self, job, engine, content, sessions)

    def give_back(self, session: Session) -> None:
        """A row is answered."""
        if session.engine in self._free:
            self._free[session.engine].append(session)

    # ------------------------------------------------------------ within

    def _take(self, engine: Engine, count: int, name: str) -> Sequence[Session]:
        """So many sessions without a row.

        Raises:
            Refused: as Directory.create; none was taken.
        """
        free = self._free.setdefault(engine, deque())
        directory, taken = self.core.directory, list[Session]()
        try:
            while len(taken) < count:
                # The last that was used: the others may become idle.
                session = free.pop() if free else None
                if session is None:
                    session = directory.create(
                        engine, self.core.now(), session_id=f"{name}:row:{next(self._numbers)}", max_in_flight=1
                    )
                elif directory.sessions.get(session.id) is not session or session.closing is not None:
                    continue
                taken.append(session)
        except Refused:
            free.extend(taken)
            raise
        return taken

    def _forget(self, engine: Engine) -> None:
        self._free.pop(engine, None)


class Rows:
    """A request's rows under way. Made with the request; submits them at once."""

    def __init__(self, plain: Plain, job: Job, engine: Engine, content: Content, sessions: Sequence[Session]) -> None:
        self._plain = plain
        self._job = job
        self._engine = engine
        self._content = content
        self._rows: list[Sequence[Array] | None] = [None] * len(sessions)
        self._left = len(sessions)
        self._fault: Fault | None = None
        core = plain.core
        timeout_s = job.parameters.timeout_s or core.directory.limits.step_timeout_s
        self._under_way = [_Row(self, index, session) for index, session in enumerate(sessions)]
        for row, inputs in zip(self._under_way, content.rows, strict=True):
            row.seq = row.session.accepted_seq + 1
            core.directory.submit(
                row.session,
                Submission(
                    row.seq,
                    row,
                    inputs,
                    content.length,
                    fingerprint(inputs),
                    timeout_s=timeout_s,
                    acked_seq=row.session.applied_seq,
                ),
                core.now(),
            )

    def cancel(self) -> None:
        """The caller is gone: what has not run is taken back."""
        for row in self._under_way:
            if take_back(self._plain.core, row.session, row.seq, row):
                self._plain.give_back(row.session)

    def landed(self, row: "_Row", answer: Answer) -> None:
        """A row is answered; with the last, the request is."""
        self._plain.give_back(row.session)
        self._rows[row.index] = answer.outputs
        self._fault = self._fault or answer.fault
        self._left -= 1
        if self._left:
            return
        if self._fault is not None:
            self._job.reply(self._fault)
            return
        rows = [outputs for outputs in self._rows if outputs is not None]
        engine = self._engine
        self._job.reply(respond(self._job, engine, self._content, rows))


class _Row:
    """One row, as the `reply_to` of its step."""

    __slots__ = ("_rows", "index", "seq", "session")

    def __init__(self, rows: Rows, index: int, session: Session) -> None:
        self._rows = rows
        self.index = index
        self.session = session
        self.seq = 0

    def answered(self, answer: Answer) -> None:
        """The row is run, or never will be."""
        self._rows.landed(self, answer)

    def closed(self, _: Closed) -> None:
        """Nobody closes it here."""
