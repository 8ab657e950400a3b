"""The rows of one request to a model without state, from their submission to the answer.

Invariants: a row is answered once, with many others as a member of the offer, or by itself; with the last the request
is, and its sessions are free.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.fingerprint import fingerprints
from conveyor_proto.reasons import Fault
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.inference.answers import respond
from conveyor_server.inference.job import Job, take_back
from conveyor_server.inference.requests import Content
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Answer, Closed
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.session import Session, Submission
from conveyor_server.tracing import CallTrace

# Rows that are not worth the arrays of an offer.
_FEW = 4


class Rows:
    """Rows under way; a Sink of their offer. Core thread only.

    Args:
        core: what drives the sessions.
        job: the request.
        engine: of the model.
        content: what was read of the request.
        sessions: of the rows, which have nothing else under way.
        done: gets the sessions back.
    """

    def __init__(
        self,
        core: Core,
        job: Job,
        engine: Engine,
        content: Content,
        sessions: Sequence[Session],
        *,
        done: Callable[[Sequence[Session]], None],
    ) -> None:
        self._core = core
        self._job = job
        self._engine = engine
        self._content = content
        self._sessions = sessions
        self._done = done
        self._left = len(sessions)
        self._fault: Fault | None = None
        self._cancelled = False
        # One for each of ModelSpec.outputs, `[batch, ...]`; made with the first rows that come back.
        self._outputs: list[Array] = []
        rows = np.array([session.row for session in sessions])
        self._rows = rows
        self._seqs = core.directory.table.applied_seq[rows] + 1

    def submit(self, holders: NDArray[np.int64]) -> None:
        """Gives the rows to their sessions: together where that goes, the others by themselves.

        Args:
            holders: the number of who holds each session.
        """
        content, engine, directory = self._content, self._engine, self._core.directory
        timeout_s = self._job.parameters.timeout_s or directory.limits.step_timeout_s
        prints = fingerprints(content.inputs)
        left: Sequence[int] = range(len(self._sessions))
        if content.length <= engine.limits.quantum and len(left) >= _FEW:
            offer = Offer(
                engine,
                self._sessions[0].record,
                self._rows,
                self._rows,
                self._seqs,
                self._seqs - 1,
                holders,
                prints[:, np.newaxis],
                content.inputs,
                content.length,
                1,
                True,
                timeout_s,
                self,
            )
            left = directory.offer(offer, self._core.now()).tolist()
        for row in left:
            submission = Submission(
                int(self._seqs[row]),
                _Row(self, row),
                [array[row] for array in content.inputs],
                content.length,
                int(prints[row]),
                timeout_s=timeout_s,
                acked_seq=int(self._seqs[row]) - 1,
            )
            directory.submit(self._sessions[row], submission, self._core.now())

    @property
    def trace(self) -> CallTrace | None:
        """Of the call that they came with."""
        return self._job.trace

    def cancel(self) -> None:
        """The caller is gone: what has not run is taken back."""
        self._cancelled = True
        for row, session in enumerate(self._sessions):
            if take_back(self._core, session, int(self._seqs[row]), _Row(self, row)):
                self._land(1)

    # ------------------------------------------------------------ as a sink

    def landed(self, members: NDArray[np.int64], outputs: Sequence[Array]) -> None:
        """These rows are applied."""
        self._keep(members, outputs)
        self._land(len(members))

    def refused(self, members: NDArray[np.int64], fault: Fault) -> None:
        """These rows are not accepted."""
        self._fault = self._fault or fault
        self._land(len(members))

    def reply_to(self, member: int) -> object:
        """Who gets the answer of a row that is answered alone."""
        return _Row(self, member)

    @property
    def kind(self) -> object:
        """It is joined with no other: each request has an answer of its own."""
        return self

    def joined(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> "Rows":
        """Never asked for: see `kind`."""
        del parts
        raise AssertionError("rows of a request are joined with no others")

    # ------------------------------------------------------------ within

    def answered(self, row: int, answer: Answer) -> None:
        """A row is answered by itself."""
        self._fault = self._fault or answer.fault
        if answer.fault is None:
            self._keep(row, answer.outputs)
        self._land(1)

    def _keep(self, rows: "NDArray[np.int64] | int", outputs: Sequence[Array]) -> None:
        if not self._outputs:
            count = len(self._sessions)
            first = 0 if isinstance(rows, int) else 1
            self._outputs = [np.empty((count, *array.shape[first:]), array.dtype) for array in outputs]
        for kept, array in zip(self._outputs, outputs, strict=True):
            kept[rows] = array

    def _land(self, count: int) -> None:
        self._left -= count
        if self._left:
            return
        self._done(self._sessions)
        if self._cancelled:
            return
        if self._fault is not None:
            self._job.reply(self._fault)
        else:
            self._job.reply(respond(self._job, self._engine, self._content, self._outputs))


class _Row:
    """One row, as the `reply_to` of its step; equal to any other of the same."""

    __slots__ = ("_row", "_rows")

    def __init__(self, rows: Rows, row: int) -> None:
        self._rows = rows
        self._row = row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row) and (other._rows, other._row) == (self._rows, self._row)

    def __hash__(self) -> int:
        return hash((id(self._rows), self._row))

    @property
    def trace(self) -> CallTrace | None:
        """Of the call that it came with."""
        return self._rows.trace

    def answered(self, answer: Answer) -> None:
        """The row is run, or never will be."""
        self._rows.answered(self._row, answer)

    def closed(self, _: Closed) -> None:
        """Nobody closes it here."""
