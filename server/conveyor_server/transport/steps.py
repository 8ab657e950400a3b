"""The steps of one stream: from its messages to their sessions, or refused.

Invariants: steps of a session go in the order in which they came; where one waits for its session to come from the
store, so does what came behind it, and the rows of a frame stay together.
"""

from collections.abc import Sequence
from typing import Protocol

from conveyor_proto.codec import Array, WireError
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.frame_inputs import read_numbers
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.convert import submission
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Attachment
from conveyor_server.transport import seating
from conveyor_server.transport.framing import FrameReader, FrameSender
from conveyor_server.transport.intake import Intake
from conveyor_server.transport.seat import Reply
from conveyor_server.transport.seating import Seating
from conveyor_server.transport.step_parts import Sender


class Call(FrameSender, Sender, seating.Call, Protocol):
    """The stream; see StreamCall."""

    def reply_to(self, seat: Attachment, *, framed: bool = False) -> Reply:
        """The `reply_to` of a session's steps."""


class Steps:
    """Of one stream. Core thread only.

    Args:
        call: the stream.
        core: what drives the sessions.
        metrics: counts refusals.
        intake: of all streams.
        waiting: what waits for its session to come.
    """

    __slots__ = ("_call", "_core", "_frames", "_intake", "_seating")

    def __init__(self, call: Call, core: Core, metrics: Metrics, intake: Intake, waiting: Seating) -> None:
        self._call = call
        self._core = core
        self._frames = FrameReader(call, core, metrics)
        self._intake = intake
        self._seating = waiting

    def forget(self) -> None:
        """The stream's sessions are others now."""
        self._frames.forget()

    def frames(self, frames: list[session_pb2.StepFrame], *, whole: bool) -> None:
        """Takes frames, as one where that goes; they are the `whole` of what came in this turn."""
        if not frames:
            return
        self._core.catch_up()
        together = self._frames.together(frames) if len(frames) > 1 else None
        frames = frames if together is None else [together]
        if not whole or len(frames) > 1:
            for frame in frames:
                self._frame(frame, whole=False)
            return
        (frame,) = frames
        both = None if together is None else self._frames.first_of_each(frame)
        if both is not None:
            # What follows another step of its session goes with what comes in the next turn.
            frame, later = both
            self._intake.put_back(self._call, session_pb2.StreamRequest(frame=later).SerializeToString())
        self._frame(frame, whole=True)

    def step(self, message: session_pb2.Step, *, whole: bool) -> None:
        """Takes a step; it is the `whole` of what came in this turn."""
        call = self._call
        seat = call.seat(message.handle)
        if isinstance(seat, Fault):
            call.refuse(message.handle, message.seq, seat)
            return
        session = seat.session
        if session.asleep:
            if not self._seating.wakes((seat,), session_pb2.StreamRequest(step=message)):
                call.refuse(message.handle, message.seq, self._seating.why_away(seat, message.seq))
            return
        step = submission(
            session.engine.reader.read(message.inputs, self._core.max_time_steps),
            self._core.directory.limits,
            seq=message.seq,
            reply_to=call.reply_to(seat),
            epoch=seat.epoch,
            timeout_ms=message.timeout_ms,
            acked_seq=message.acked_seq,
        )

        def reply(outputs: Sequence[Array]) -> None:
            call.outlet.put(
                self._intake.writer(session.engine).write_one(message.handle, message.seq, outputs, session.durable_seq)
            )

        if not (whole and step.fault is None and self._core.run_one_now(seat, step, reply)):
            self._core.directory.submit(session, step, self._core.now())

    def _frame(self, frame: session_pb2.StepFrame, *, whole: bool) -> None:
        call = self._call
        if self._seating.awaits and self._seating.takes(session_pb2.StreamRequest(frame=frame)):
            # One before it in this turn waits, and this one with it.
            return
        try:
            numbers = read_numbers(frame)
        except WireError as error:
            call.refuse(0, 0, error.fault)
            return
        if self._core.store is not None:
            strangers = set(numbers.handles.tolist()).difference(call.rows)
            held = [held for handle in strangers if (held := call.seats.get(handle)) is not None and not held.leaving]
            if held and self._seating.wakes(held, session_pb2.StreamRequest(frame=frame)):
                # The whole frame waits: its rows are to stay in their order.
                return
        contents = self._frames.read(frame, numbers, whole=whole)
        directory, now = self._core.directory, self._core.now()
        for row, content, acked_seq in contents:
            handle, seq = int(numbers.handles[row]), int(numbers.seqs[row])
            seat = call.seat(handle)
            if isinstance(seat, Fault):
                call.refuse(handle, seq, seat)
                continue
            if seat.session.asleep:
                call.refuse(handle, seq, self._seating.why_away(seat, seq))
                continue
            step = submission(
                content,
                directory.limits,
                seq=seq,
                reply_to=call.reply_to(seat, framed=True),
                epoch=seat.epoch,
                timeout_ms=frame.timeout_ms,
                acked_seq=acked_seq,
            )
            directory.submit(seat.session, step, now)
