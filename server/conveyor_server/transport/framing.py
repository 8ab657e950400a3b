"""A stream's StepFrames: offered as a whole where all rows are alike, which in a steady stream they are.

Invariant: every row of a frame that can be read is answered: through the offer, or alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from conveyor_proto.codec import WireError
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.frame_inputs import Block, FrameColumns, RowNumbers, invalid, read_columns, read_numbers
from conveyor_server.inputs import StepInputs
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.flight import Offer
from conveyor_server.transport.sinks import Caller, FrameSink, durable_seqs_of

_HANDLE_BYTES, _SEQ_BYTES = 4, 8
# Rows of a frame that is taken together with others: larger ones gain nothing, and all of a turn must be a frame still.
_MOST_TOGETHER = 1024
# Rows for each that goes now, of which the others wait for a later turn.
_MOST_LATER = 8


class FrameSender(Caller, Protocol):
    """A stream that sends frames; see intake.Sender."""

    number: int
    rows: dict[int, int]


class FrameReader:
    """Reads the frames of one stream. Core thread only.

    Args:
        sender: the stream.
        core: what drives the sessions.
        metrics: counts refusals.
    """

    __slots__ = ("_core", "_last", "_metrics", "_sender")

    def __init__(self, sender: FrameSender, core: Core, metrics: Metrics) -> None:
        self._sender = sender
        self._core = core
        self._metrics = metrics
        # The last frame's: the next has the same handles.
        self._last = _NO_ROWS

    def forget(self) -> None:
        """The stream's sessions are others now."""
        self._last = _NO_ROWS

    def read(
        self, frame: session_pb2.StepFrame, numbers: RowNumbers, *, whole: bool
    ) -> Iterable[tuple[int, StepInputs | Fault, int]]:
        """Offers the rows to their sessions; what is left is to be submitted: row, content and acked_seq.

        A frame that is the `whole` of its turn can be run at once.
        """
        rows = self._rows(frame.handles, numbers)
        count = len(rows.rows)
        engine = self._engine(rows)
        if isinstance(engine, Fault):
            return _alike(engine, count)
        try:
            columns = read_columns(frame, count, engine.spec)
        except WireError as error:
            return _alike(error.fault, count)
        left: NDArray[np.int64] | None = None
        block = columns.block(engine.limits.quantum) if rows.known else None
        if block is not None:
            offer = self._offer(frame, numbers, rows, columns, block)
            if whole and self._core.run_now(offer):
                return ()
            left = self._core.directory.offer(offer, self._core.now())
            if offer.train > 1 and len(left):
                # A train goes as a whole or not at all.
                left = None
        return _alone(columns, self._core.max_time_steps, left)

    def together(self, frames: Sequence[session_pb2.StepFrame]) -> session_pb2.StepFrame | None:
        """One frame with the rows of all of them, in order; None where they must be read one by one.

        A frame that cannot be read, or has a session of another model, is refused by itself.
        """
        first = frames[0]
        if not all(_alike_in_form(first, frame) for frame in frames):
            return None
        whole = session_pb2.StepFrame(
            handles=b"".join([frame.handles for frame in frames]),
            seqs=b"".join([frame.seqs for frame in frames]),
            columns=[b"".join(parts) for parts in zip(*(frame.columns for frame in frames), strict=True)],
            timeout_ms=first.timeout_ms,
            acked_seqs=b"".join([frame.acked_seqs for frame in frames]),
        )
        try:
            rows = self._rows(whole.handles, read_numbers(whole))
        except WireError:  # whichever of them it is about says so
            return None
        if not rows.known or isinstance(self._engine(rows), Fault):
            return None
        return whole

    def first_of_each(self, frame: session_pb2.StepFrame) -> tuple[session_pb2.StepFrame, session_pb2.StepFrame] | None:
        """What `together` made in two, where sessions are in it several times: the first row of each, and the others.

        None where no session is, where the others are many times more (a client that sends ahead of the answers is not
        to fill the memory), or where the columns cannot be cut into rows, which whoever reads them will say.
        """
        numbers = read_numbers(frame)
        count = len(numbers.handles)
        if self._rows(frame.handles, numbers).distinct or any(len(column) % count for column in frame.columns):
            return None
        first = np.zeros(count, np.bool_)
        first[np.unique(numbers.handles, return_index=True)[1]] = True
        if _MOST_LATER * np.count_nonzero(first) < count:
            return None
        return _rows_of(frame, first), _rows_of(frame, ~first)

    def _rows(self, handles: bytes, numbers: RowNumbers) -> "_Rows":
        if handles != self._last.handles:
            known = self._sender.rows
            rows = np.array([known.get(handle, -1) for handle in numbers.handles.tolist()], np.int64)
            self._last = _Rows.of(handles, rows)
        return self._last

    def _engine(self, rows: "_Rows") -> Engine | Fault:
        """The engine of all sessions that the frame names."""
        table = self._core.directory.table
        known = rows.rows if rows.known else rows.rows[rows.rows >= 0]
        records = table.record[rows.where if rows.known else known]
        if len(known) and (records == records[0]).all():
            session = table.sessions[int(known[0])]
            if session is not None:
                return session.engine
        sessions = (table.sessions[row] for row in known.tolist())
        engines = {session.engine for session in sessions if session is not None}
        names = ", ".join(sorted(f"{engine.model} version {engine.version}" for engine in engines))
        return invalid(f"the frame's sessions are of {names or 'no model'}: send a frame for each model version").fault

    def _offer(
        self,
        frame: session_pb2.StepFrame,
        numbers: RowNumbers,
        rows: "_Rows",
        columns: FrameColumns,
        block: Block,
    ) -> Offer:
        directory, sender = self._core.directory, self._sender
        session = directory.table.sessions[int(rows.rows[0])]
        if session is None:
            raise AssertionError("a session that the stream holds is gone")
        handles, seqs, acked_seqs = numbers.handles, numbers.seqs, columns.acked_seqs
        inputs, prints, length, train = block.inputs, block.prints[:, np.newaxis], block.length, 1
        if not rows.distinct and _is_train(session.engine, numbers, length):
            train = len(handles)
            rows = _Rows.of(b"", rows.rows[:1])
            handles, seqs, prints, length = handles[:1], seqs[:1], prints.reshape(1, -1), train
            acked_seqs = None if acked_seqs is None else acked_seqs.max(keepdims=True)
            inputs = [array.reshape(1, train, *array.shape[2:]) for array in inputs]
        return Offer(
            session.engine,
            session.record,
            rows.rows,
            rows.where,
            seqs,
            acked_seqs,
            np.full(len(seqs), sender.number),
            prints,
            inputs,
            length,
            train,
            rows.distinct,
            frame.timeout_ms / 1e3 or directory.limits.step_timeout_s,
            FrameSink(sender, handles, seqs, rows.rows, durable_seqs_of(self._core), train, self._metrics),
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The sessions that a frame names.

    Attributes:
        handles: as they came.
        rows: int64, each one's row of the session table; -1 where the stream has no such session.
        where: the same, or the slice that they are.
        known: none is -1.
        distinct: none is there twice.
    """

    handles: bytes
    rows: NDArray[np.int64]
    where: slice | NDArray[np.int64]
    known: bool
    distinct: bool

    @classmethod
    def of(cls, handles: bytes, rows: NDArray[np.int64]) -> "_Rows":
        known = bool((rows >= 0).all())
        first, count = int(rows[0]), len(rows)
        beside = known and bool((rows == np.arange(first, first + count)).all())
        where = slice(first, first + count) if beside else rows
        return cls(handles, rows, where, known, beside or len(np.unique(rows)) == count)


_NO_ROWS = _Rows(b"", np.empty(0, np.int64), slice(0, 0), known=True, distinct=True)


def _alike_in_form(one: session_pb2.StepFrame, other: session_pb2.StepFrame) -> bool:
    """Both have rows of one time step, and as many bytes in each."""
    rows, others = len(one.handles) // _HANDLE_BYTES, len(other.handles) // _HANDLE_BYTES
    return (
        0 < others <= _MOST_TOGETHER
        and not other.lengths
        and len(other.handles) == others * _HANDLE_BYTES
        and len(other.seqs) == others * _SEQ_BYTES
        and len(other.acked_seqs) == (others * _SEQ_BYTES if one.acked_seqs else 0)
        and other.timeout_ms == one.timeout_ms
        and len(other.columns) == len(one.columns)
        and all(len(a) * others == len(b) * rows for a, b in zip(one.columns, other.columns, strict=True))
        # One session's steps behind each other run as one: the frame is best left as it is.
        and (others == 1 or other.handles[:_HANDLE_BYTES] != other.handles[-_HANDLE_BYTES:])
    )


def _rows_of(frame: session_pb2.StepFrame, chosen: NDArray[np.bool_]) -> session_pb2.StepFrame:
    """A frame with some rows of another, of one time step each."""

    def part(data: bytes) -> bytes:
        return np.frombuffer(data, np.uint8).reshape(len(chosen), -1)[chosen].tobytes()

    return session_pb2.StepFrame(
        handles=part(frame.handles),
        seqs=part(frame.seqs),
        columns=[part(column) for column in frame.columns],
        timeout_ms=frame.timeout_ms,
        acked_seqs=part(frame.acked_seqs) if frame.acked_seqs else b"",
    )


def _is_train(engine: Engine, numbers: RowNumbers, length: int) -> bool:
    """The rows are consecutive one-token steps of one session, no more than one run takes."""
    count = len(numbers.handles)
    return (
        length == 1
        and count <= engine.limits.quantum
        and engine.timed
        and bool((numbers.handles == numbers.handles[0]).all())
        and bool((np.diff(numbers.seqs) == 1).all())
    )


def _alike(fault: Fault, rows: int) -> Iterator[tuple[int, Fault, int]]:
    return ((row, fault, 0) for row in range(rows))


def _alone(
    columns: FrameColumns, max_time_steps: int, left: NDArray[np.int64] | None
) -> Iterator[tuple[int, StepInputs | Fault, int]]:
    if left is not None and not len(left):
        return
    acked = columns.acked_seqs
    rows = range(len(columns.lengths)) if left is None else left.tolist()
    for row, content in zip(rows, columns.rows(max_time_steps, rows), strict=True):
        yield row, content, 0 if acked is None else int(acked[row])
