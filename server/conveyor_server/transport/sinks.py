"""Where the answers of an offer's members go: back to the streams that sent them, in the form in which they came.

Invariant: a member is told about on the stream and under the handle that it came from, and only while the stream still
holds the session there: a session that left was taken out of its flight before. Where the server says how far sessions
are in its store, an answer says what is so when it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core, trace_of
from conveyor_server.transport.ends import Outlet
from conveyor_server.transport.result_wire import ResultWriter, write_frames


class Caller(Protocol):
    """The stream that sent a member.

    Attributes:
        outlet: sends messages, behind those that were sent before.
    """

    outlet: Outlet

    def single(self, handle: int) -> object:
        """The `reply_to` of steps under this handle that are answered by StepResults."""

    def framed(self, handle: int) -> object:
        """The `reply_to` of steps under this handle that are answered in ResultFrames."""


@dataclass(slots=True, eq=False)
class StepsSink:
    """Of Step messages, from many streams. See sessions.flight.Sink.

    Attributes:
        callers: of each member.
        handles, seqs: int64 `[members]`.
        rows: int64 `[members]`, the sessions' rows in the table.
        durable_seqs: SessionTable.durable_seq; None: the server does not say it.
        writer: of the model's results.
        metrics: counts refusals.
        labels: handles and seqs as they came, see StepLayout.labels.
        label_sizes: bytes of each handle and each seq there.
    """

    callers: Sequence[Caller]
    handles: NDArray[np.int64]
    seqs: NDArray[np.int64]
    rows: NDArray[np.int64]
    durable_seqs: NDArray[np.int64] | None
    writer: ResultWriter
    metrics: Metrics
    labels: NDArray[np.uint8] | None = None
    label_sizes: tuple[int, int] = (0, 0)

    def landed(self, members: NDArray[np.int64], outputs: Sequence[Array]) -> None:
        """Answers each."""
        callers, labels = self.callers, self.labels
        if len(members) < len(callers):
            callers = [callers[member] for member in members.tolist()]
            labels = None if labels is None else labels[members]
        durable = None if self.durable_seqs is None else self.durable_seqs[self.rows[members]]
        if labels is None:
            messages = self.writer.write(self.handles[members], self.seqs[members], outputs, durable)
        else:
            messages = self.writer.write_labelled(labels, self.label_sizes, outputs, durable)
        for caller, message in zip(callers, messages, strict=True):
            caller.outlet.put(message)

    def refused(self, members: NDArray[np.int64], fault: Fault) -> None:
        """Refuses each."""
        status = to_status(fault)
        self.metrics.refused(status, len(members))
        for member in members.tolist():
            handle, seq = int(self.handles[member]), int(self.seqs[member])
            error = session_pb2.StepError(handle=handle, seq=seq, status=status)
            if (trace := trace_of(self.callers[member])) is not None:
                trace.refused(status)
            self.callers[member].outlet.put(session_pb2.StreamResponse(error=error).SerializeToString())

    def reply_to(self, member: int) -> object:
        """As if it had come alone."""
        return self.callers[member].single(int(self.handles[member]))

    @property
    def kind(self) -> object:
        """Answers of one model can be written together, whoever they are for."""
        return self.writer

    def joined(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> "StepsSink":
        """See sessions.flight.Sink."""
        callers = [sink.callers[member] for sink, members in parts for member in members.tolist()]
        return StepsSink(callers, *_numbers(parts), self.durable_seqs, self.writer, self.metrics)


@dataclass(slots=True, eq=False)
class FrameSink:
    """Of a StepFrame.

    Attributes:
        caller: who sent it.
        handles, seqs: int64 `[members]`; of a train, of its one member's first step.
        rows, durable_seqs: as of StepsSink.
        train: steps of a member.
        metrics: counts refusals.
    """

    caller: Caller
    handles: NDArray[np.int64]
    seqs: NDArray[np.int64]
    rows: NDArray[np.int64]
    durable_seqs: NDArray[np.int64] | None
    train: int
    metrics: Metrics

    def landed(self, members: NDArray[np.int64], outputs: Sequence[Array]) -> None:
        """Answers all in frames."""
        handles, seqs, length = self.handles[members], self.seqs[members], 1
        durable = None if self.durable_seqs is None else self.durable_seqs[self.rows[members]]
        if self.train > 1:
            # A member's steps are rows of their own, as they came: its time axis is theirs.
            handles, seqs = self._steps(members)
            durable = None if durable is None else np.repeat(durable, self.train)
            outputs = [array.reshape(-1, 1, *array.shape[2:]) for array in outputs]
        else:
            length = max((array.shape[1] for array in outputs if array.ndim > 1), default=1)
        for message in write_frames(handles, seqs, length, outputs, durable):
            self.caller.outlet.put(message)

    def refused(self, members: NDArray[np.int64], fault: Fault) -> None:
        """Refuses all in one message."""
        status = to_status(fault)
        handles, seqs = self._steps(members)
        self.metrics.refused(status, len(handles))
        if (trace := trace_of(self.caller)) is not None:
            trace.refused(status, len(handles))
        errors = session_pb2.StepErrorFrame(
            handles=handles.astype(np.uint32).tobytes(), seqs=seqs.tobytes(), status=status
        )
        self.caller.outlet.put(session_pb2.StreamResponse(errors=errors).SerializeToString())

    def reply_to(self, member: int) -> object:
        """As if it had come alone in a frame."""
        return self.caller.framed(int(self.handles[member]))

    @property
    def kind(self) -> object:
        """Rows for one stream can travel in one frame."""
        return self.caller

    def joined(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> "FrameSink":
        """See sessions.flight.Sink."""
        return FrameSink(self.caller, *_numbers(parts), self.durable_seqs, self.train, self.metrics)

    def _steps(self, members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        handles = np.repeat(self.handles[members], self.train)
        return handles, (self.seqs[members][:, np.newaxis] + np.arange(self.train)).reshape(-1)


def durable_seqs_of(core: Core) -> NDArray[np.int64] | None:
    """By row of the table, what answers say; None: they say nothing."""
    return core.directory.table.durable_seq if core.says_durable else None


def _numbers(
    parts: Sequence[tuple[Any, NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Handles, seqs and rows of some members of several sinks."""
    handles = np.concatenate([sink.handles[members] for sink, members in parts])
    seqs = np.concatenate([sink.seqs[members] for sink, members in parts])
    return handles, seqs, np.concatenate([sink.rows[members] for sink, members in parts])
