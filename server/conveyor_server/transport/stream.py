"""One Stream call: its sessions by handle, what it asks of the core, and what it is told.

Invariants: without I/O, so that any transport can drive it; an error concerns one step, attach or handle and the
stream goes on; after a session left, nothing is said about it; a stream that ends in order says StreamEnd last.
"""

import functools
import time
from collections.abc import Callable

from conveyor_proto.codec import WireError
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.attach import open_session
from conveyor_server.servicers.convert import duration, session_info, step_content, submission
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Answer, Detached
from conveyor_server.sessions.rules import stopping
from conveyor_server.transport import frames
from conveyor_server.transport.outbox import Outbox
from conveyor_server.transport.replies import Replies
from conveyor_server.transport.seat import Seat


class StreamCall:
    """The server's side of one stream. Core thread only.

    Args:
        core: what drives the sessions.
        outbox: where messages to the client go.
        metrics: what is counted.
    """

    def __init__(self, core: Core, outbox: Outbox, metrics: Metrics) -> None:
        self._core = core
        self._outbox = outbox
        self._metrics = metrics
        self._seats: dict[int, Seat] = {}
        self._replies = Replies(self._send)
        self._routed = False
        self._ending = False
        # Told to go away, and listened to until it half-closes.
        self._lingering = False
        self._broken = False

    # ------------------------------------------------------------ from the client

    def receive(self, request: session_pb2.StreamRequest) -> None:
        """Takes one message."""
        kind = request.WhichOneof("kind")
        if kind == "frame":
            self._frame(request.frame)
        elif kind == "step":
            self._step(request.step)
        elif kind == "attach":
            self._attach(request.attach)
        elif kind == "detach":
            self._detach(request.detach.handle)
        elif kind == "close":
            self._close(request.close.handle)
        else:
            message = "the message holds nothing that this server knows: send attach, step, frame, detach or close"
            self._refuse(0, 0, Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "kind"}))
        self._core.kick()

    def half_close(self) -> None:
        """The client sends no more: detach all, answer what was accepted, then end."""
        self._lingering = False
        self._end()

    # ------------------------------------------------------------ from the server

    def go_away(self, grace_s: float) -> None:
        """The server stops in `grace_s` seconds: say so, detach all, answer what was accepted, then end.

        It ends once the client half-closes, or at `stop_lingering`: a call that ends under a client's write costs that
        client the answers that it has not read.
        """
        self._outbox.put(session_pb2.StreamResponse(go_away=session_pb2.GoAway(grace=duration(grace_s))))
        self._lingering = not self._ending
        self._end()

    def stop_lingering(self) -> None:
        """The client had the time to half-close."""
        if self._lingering:
            self.half_close()

    def broken(self) -> None:
        """The call is gone. Sessions live on, and what was accepted is run and recorded."""
        self._broken = True
        self._outbox.close()
        self._core.directory.abandon([seat.attachment for seat in self._seats.values()], self._core.now())
        self._seats.clear()

    # ------------------------------------------------------------ from the core

    def detached(self, event: Detached) -> None:
        """A session left the stream; its handle is free."""
        attachment = event.attachment
        seat = self._seats.get(attachment.handle)
        if seat is None or seat.attachment is not attachment:
            return
        del self._seats[attachment.handle]
        message = session_pb2.SessionDetached(
            handle=attachment.handle,
            cause=event.cause,
            session_id=attachment.session.id,
            applied_seq=event.applied_seq,
        )
        self._expect_flush()
        self._replies.about(attachment.handle, attachment.session.engine, session_pb2.StreamResponse(detached=message))

    def _single(self, seat: Seat, answer: Answer) -> None:
        if self._holds(seat):
            self._expect_flush()
            self._replies.single(seat.attachment.handle, answer)

    def _framed(self, seat: Seat, answer: Answer) -> None:
        if self._holds(seat):
            self._expect_flush()
            self._replies.framed(seat.attachment.handle, answer)

    def _holds(self, seat: Seat) -> bool:
        # A session that left may still have had a step under way: its answer is recorded, and not told here.
        return self._seats.get(seat.attachment.handle) is seat

    # ------------------------------------------------------------ requests

    def _attach(self, message: session_pb2.AttachSession) -> None:
        handle = message.handle
        if handle in self._seats:
            text = f"handle {handle} is taken on this stream: choose another, or wait for its SessionDetached"
            self._refuse(handle, 0, Fault(e.ERROR_REASON_HANDLE_IN_USE, text, {"handle": str(handle)}))
            return
        try:
            session, resumed = open_session(message, self._core)
            attachment = self._core.directory.attach(
                session, self, handle, self._core.now(), max_epoch=message.max_epoch if resumed else 0
            )
        except Refused as refusal:
            self._refuse(handle, 0, refusal.fault)
            return
        # What happened to the session before must be told before: this stream may have held it under another handle.
        self._core.route()
        self._seats[handle] = Seat(attachment, self._single, self._framed)
        info = session_info(session, self._core)
        attached = session_pb2.SessionAttached(handle=handle, session=info, resumed=resumed)
        self._outbox.put(session_pb2.StreamResponse(attached=attached))

    def _step(self, message: session_pb2.Step) -> None:
        seat = self._seat(message.handle)
        if isinstance(seat, Fault):
            self._refuse(message.handle, message.seq, seat)
            return
        session = seat.attachment.session
        step = submission(
            step_content(message.inputs, session.engine.spec, self._core.max_time_steps),
            self._core.directory.limits,
            seq=message.seq,
            reply_to=seat.single,
            epoch=seat.attachment.epoch,
            timeout_ms=message.timeout_ms,
            acked_seq=message.acked_seq,
        )
        self._core.directory.submit(session, step, self._core.now())

    def _frame(self, frame: session_pb2.StepFrame) -> None:
        try:
            handles, seqs = frames.numbers(frame)
        except WireError as error:
            self._refuse(0, 0, error.fault)
            return
        seats = [self._seat(handle) for handle in handles]
        engines = {seat.attachment.session.engine for seat in seats if isinstance(seat, Seat)}
        contents = frames.contents(frame, len(seats), engines, self._core.max_time_steps)
        directory, now = self._core.directory, self._core.now()
        for handle, seq, seat, (content, acked_seq) in zip(handles, seqs, seats, contents, strict=True):
            if isinstance(seat, Fault):
                self._refuse(handle, seq, seat)
                continue
            step = submission(
                content,
                directory.limits,
                seq=seq,
                reply_to=seat.framed,
                epoch=seat.attachment.epoch,
                timeout_ms=frame.timeout_ms,
                acked_seq=acked_seq,
            )
            directory.submit(seat.attachment.session, step, now)

    def _detach(self, handle: int) -> None:
        seat = self._seat(handle)
        if isinstance(seat, Fault):
            self._refuse(handle, 0, seat)
            return
        seat.leaving = True
        self._core.directory.detach(seat.attachment, self._core.now())

    def _close(self, handle: int) -> None:
        seat = self._seat(handle)
        if isinstance(seat, Fault):
            self._refuse(handle, 0, seat)
            return
        seat.leaving = True
        self._core.directory.close(seat.attachment.session, seat.single, self._core.now())

    def _seat(self, handle: int) -> Seat | Fault:
        seat = self._seats.get(handle)
        if seat is not None and not seat.leaving:
            return seat
        if self._lingering:
            return stopping(self._core.directory.limits.retry_s)
        what = "is being let go" if seat is not None else "is not attached"
        text = f"handle {handle} {what} on this stream: attach a session under it first"
        return Fault(e.ERROR_REASON_HANDLE_UNKNOWN, text, {"handle": str(handle)})

    # ------------------------------------------------------------ messages

    def _end(self) -> None:
        if self._broken:
            return
        if not self._ending:
            self._ending = True
            for seat in list(self._seats.values()):
                # What still comes for it is refused here: the session's own refusal would follow its SessionDetached.
                seat.leaving = True
                self._core.directory.detach(seat.attachment, self._core.now())
        self._expect_flush()
        self._core.kick()

    def _refuse(self, handle: int, seq: int, fault: Fault) -> None:
        self._expect_flush()
        self._replies.error(handle, seq, fault)

    def _send(self, message: session_pb2.StreamResponse, engine: Engine | None, steps: int) -> None:
        if engine is not None:
            reply = self._metrics.of(engine).reply
            self._outbox.put(message, functools.partial(_observe_reply, reply.observe, time.perf_counter(), steps))
            return
        if message.HasField("error"):
            self._metrics.refused(message.error.status)
        self._outbox.put(message)

    def _expect_flush(self) -> None:
        if not self._routed:
            self._routed = True
            self._core.after_routing(self._flush)

    def _flush(self) -> None:
        self._routed = False
        self._replies.flush()
        if self._ending and not self._seats and not self._lingering:
            self._outbox.put(session_pb2.StreamResponse(end=session_pb2.StreamEnd()))
            self._outbox.close()


def _observe_reply(observe: Callable[[float, int], None], began: float, steps: int) -> None:
    observe(time.perf_counter() - began, steps)
