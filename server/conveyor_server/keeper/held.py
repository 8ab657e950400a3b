"""Answers that leave only when the states behind them are in the store: what SYNC means on a stream.

Invariants: a stream's messages leave in their order; a message that was put before the states were gathered for a job
leaves once that job has written them, and never before; where the store stays away, steps whose answers wait are
refused (they are applied, and their answers are recorded: sent again, they are answered once the store is back).
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import session_pb2
from google.rpc import status_pb2

from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.refusals import store_away
from conveyor_server.sessions.session import DetachCause, Session


class Outlet(Protocol):
    """Where a stream's messages go, in order. See transport.ends."""

    def put(self, message: bytes) -> None:
        """Queues a message behind the others."""

    def close(self, status: status_pb2.Status | None = None) -> None:
        """Nothing follows."""

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""


class Held:
    """An Outlet of a stream that holds a SYNC session. Core thread only.

    Args:
        outlet: the stream's own.
        waits: told when there is something to let go.
    """

    __slots__ = ("_end", "_ends", "_lost", "_marks", "_outlet", "_queue", "_waits")

    def __init__(self, outlet: Outlet, waits: "Callable[[Held], None]") -> None:
        self._outlet = outlet
        self._waits = waits
        self._queue: deque[bytes] = deque()
        # Handles of sessions that are let go of, of which steps may run still.
        self._lost: set[int] = set()
        # Of each job that is to let some go: its number, and how many are left of them.
        self._marks: deque[list[int]] = deque()
        self._ends = False
        self._end: status_pb2.Status | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, message: bytes) -> None:
        """Queues a message behind the others, until the store has what it tells of."""
        if self._ends:
            return
        self._queue += self._still_true(message) if self._lost else [message]
        self._waits(self)

    def close(self, status: status_pb2.Status | None = None) -> None:
        """Nothing follows; what is queued is still sent, when it may be."""
        if not self._ends:
            self._ends, self._end = True, status
            self._finish()

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""
        self._ends = True
        self._queue.clear()
        self._marks.clear()
        self._outlet.fail(status)

    def mark(self, job: int) -> None:
        """All that is queued now leaves with that job."""
        count = len(self._queue) - sum(mark[1] for mark in self._marks)
        if count:
            self._marks.append([job, count])

    def release(self, job: int) -> None:
        """That job is done, and so are those before it."""
        while self._marks and self._marks[0][0] <= job:
            for _ in range(self._marks.popleft()[1]):
                self._outlet.put(self._queue.popleft())
        self._finish()

    def unmark(self) -> None:
        """The job did not write: what it was to let go waits for another."""
        self._marks.clear()

    def release_all(self) -> None:
        """Nothing is behind what is queued that the store does not have."""
        self._marks.clear()
        while self._queue:
            self._outlet.put(self._queue.popleft())
        self._finish()

    def drop(self, handle: int) -> None:
        """Takes out what is said of steps of a session that this server does not hold any more, until it has left."""
        self._replace(lambda message: _without(message, handle))
        self._lost.add(handle)

    def refuse(self, fault: Fault) -> None:
        """Turns the answers that wait into refusals; what else is queued leaves behind them, in its place."""
        self._replace(lambda message: _refused(message, fault))
        self.release_all()

    def _still_true(self, message: bytes) -> list[bytes]:
        """A message without what it says of sessions that are let go of."""
        response = session_pb2.StreamResponse.FromString(message)
        if response.HasField("detached"):
            self._lost.discard(response.detached.handle)
            return [message]
        messages = [message]
        for handle in self._lost:
            messages = [part for whole in messages for part in _without(whole, handle)]
        return messages

    def _replace(self, change: Callable[[bytes], list[bytes]]) -> None:
        messages, self._queue = self._queue, deque()
        # A mark counts messages: what replaces one of its own is its own.
        for mark in self._marks:
            changed = [new for _ in range(mark[1]) for new in change(messages.popleft())]
            mark[1] = len(changed)
            self._queue += changed
        self._queue += [new for message in messages for new in change(message)]

    def _finish(self) -> None:
        if self._ends and not self._queue:
            self._outlet.close(self._end)


def disown(
    directory: Directory, session: Session, why: Fault, cause: DetachCause, now: float, *, reply_to: object = None
) -> None:
    """Lets go of a session that is another server's, or nobody's, by now; see Directory.let_go.

    What waits to be told of its steps is of a history that is not the session's any more, and is never told.
    """
    held = session.attachment
    if held is not None and isinstance(held.outlet, Held):
        held.outlet.drop(held.handle)
    directory.let_go(session, why, cause, now, reply_to)


def _refused(message: bytes, fault: Fault) -> list[bytes]:
    """A message with its answers turned into refusals."""
    response = session_pb2.StreamResponse.FromString(message)
    kind = response.WhichOneof("kind")
    status = to_status(fault)
    if kind == "result":
        error = session_pb2.StepError(handle=response.result.handle, seq=response.result.seq, status=status)
        return [session_pb2.StreamResponse(error=error).SerializeToString()]
    if kind == "frame":
        errors = session_pb2.StepErrorFrame(handles=response.frame.handles, seqs=response.frame.seqs, status=status)
        return [session_pb2.StreamResponse(errors=errors).SerializeToString()]
    return [message]


def _without(message: bytes, handle: int) -> list[bytes]:
    """A message without what it says of one handle's steps; none, where there is nothing else in it."""
    response = session_pb2.StreamResponse.FromString(message)
    kind = response.WhichOneof("kind")
    if kind == "frame":
        return _frame_without(message, response.frame, handle)
    if kind == "errors":
        stays = np.frombuffer(response.errors.handles, "<u4") != handle
        response.errors.handles = _rows(response.errors.handles, stays)
        response.errors.seqs = _rows(response.errors.seqs, stays)
        return [response.SerializeToString()] if stays.any() else []
    # An error without a seq is of the session itself: it was not let in, say.
    of_it = (kind == "result" and response.result.handle == handle) or (
        kind == "error" and response.error.handle == handle and response.error.seq > 0
    )
    return [] if of_it else [message]


def _frame_without(message: bytes, frame: session_pb2.ResultFrame, handle: int) -> list[bytes]:
    handles = np.frombuffer(frame.handles, "<u4")
    stays = handles != handle
    if stays.all():
        return [message]
    if frame.lengths:
        # Which bytes are whose depends on the model. Refused, the others are sent again and answered from the record.
        return _refused(message, store_away("", 0.0, "another server has one of this frame's sessions"))
    if not stays.any():
        return []
    kept = session_pb2.ResultFrame(
        handles=handles[stays].tobytes(), seqs=np.frombuffer(frame.seqs, "<u8")[stays].tobytes()
    )
    kept.columns.extend(_rows(column, stays) for column in frame.columns)
    if frame.durable_seqs:
        kept.durable_seqs = np.frombuffer(frame.durable_seqs, "<u8")[stays].tobytes()
    renumbered = np.cumsum(stays) - 1
    replayed = np.frombuffer(frame.replayed_rows, "<u4")
    kept.replayed_rows = renumbered[replayed[stays[replayed]]].astype("<u4").tobytes()
    return [session_pb2.StreamResponse(frame=kept).SerializeToString()]


def _rows(column: bytes, stays: "np.typing.NDArray[np.bool_]") -> bytes:
    return np.frombuffer(column, np.uint8).reshape(len(stays), -1)[stays].tobytes()
