"""One Stream call: its sessions by handle, what it asks of the core, and what it is told.

Invariants: without I/O, so that any transport can drive it; an error concerns one step, attach or handle and the
stream goes on; after a session left, nothing is said about it; a stream that ends in order says StreamEnd last.
"""

import itertools
from collections.abc import Sequence

from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from conveyor_server.identity.caller import ANYBODY, Caller
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.convert import duration
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Answer, Attachment, Detached, Slept
from conveyor_server.sessions.refusals import stopping
from conveyor_server.sessions.session import Session
from conveyor_server.tracing import current
from conveyor_server.transport.ends import Outlet
from conveyor_server.transport.intake import Intake
from conveyor_server.transport.presence import Presence
from conveyor_server.transport.replies import Replies
from conveyor_server.transport.seat import NOBODY, Reply
from conveyor_server.transport.seating import Seating
from conveyor_server.transport.step_layout import FRAME_TAG, STEP_TAG
from conveyor_server.transport.steps import Steps

# Never used again, so that a session's gate can name a stream long gone.
_numbers = itertools.count(1)
# Steps of a stream's only session that are read before it is known what the answers take, about.
_MOST_AHEAD = 8
# First bytes of what is taken together at the end of a turn.
_GATHERED = (STEP_TAG, FRAME_TAG)


class StreamCall:
    """The server's side of one stream. Core thread only.

    Args:
        core: what drives the sessions.
        outlet: where messages to the client go.
        metrics: what is counted.
        intake: gathers steps of all streams.
        caller: who has opened it.

    Attributes:
        number: of this stream, among all that there ever were.
        seats: the sessions that it holds, by handle.
        is_broken: the call is gone.
        ending: nothing new is taken, and the call ends once all is told.
        rows: of the session table, by handle: the sessions that it holds.
        handle: of the only session that it holds; -1: it holds none, or several.
        row: that one's.
        trace: of the call, where calls are traced.
        outlet: where messages to the client go. What comes for a whole turn's streams at once goes there straight: it
            has been put in order before.
    """

    __slots__ = (
        *("_core", "_frames_last", "_intake", "_lingering", "_metrics", "_presence", "_replies", "_routed", "_seating"),
        *("_steps", "ending", "handle", "is_broken", "number", "outlet", "row", "rows", "seats", "trace"),
    )

    def __init__(self, core: Core, outlet: Outlet, metrics: Metrics, intake: Intake, caller: Caller = ANYBODY) -> None:
        self.number = next(_numbers)
        self.rows: dict[int, int] = {}
        self.handle = self.row = -1
        self.outlet = outlet
        self._core = core
        self._metrics = metrics
        self._intake = intake
        self.trace = current()
        self._presence = None if self.trace is None else Presence(self.trace)
        self.seats: dict[int, Attachment] = {}
        self._seating = Seating(self, core, caller)
        self._steps = Steps(self, core, metrics, intake, self._seating)
        self._replies = Replies(self._send, self._put_bytes, intake.writer, says_durable=core.says_durable)
        self._routed = False
        # The last message held a frame.
        self._frames_last = False
        self.ending = False
        # Told to go away, and listened to until it half-closes.
        self._lingering = False
        self.is_broken = False

    # ------------------------------------------------------------ from the client

    @property
    def eager(self) -> bool:
        """The next message is wanted before this one is answered.

        It may be another session's, for the same run; or its turn would come after a longer run only. Not where the
        session has steps enough: answers to all that a client may have sent can be much more than it may leave unread.
        """
        return self.handle < 0 or (self._core.pressed and self._steps_ahead() < _MOST_AHEAD)

    @property
    def gathers(self) -> bool:
        """Of many sessions, whose steps come one by one. A frame is a run by itself, and the next frame another."""
        return self.eager and not self._frames_last

    def receive(self, data: bytes) -> None:
        """Takes one message; bytes that are none end the stream with INVALID_ARGUMENT."""
        if not self._seating.awaits and data and data[0] in _GATHERED:
            self._frames_last = data[0] == FRAME_TAG
            self._intake.add(self, data)
            return
        self._catch_up()
        self._read(data)
        self._core.kick()

    def step(self, data: bytes, *, whole: bool = False) -> None:
        """Takes a message that holds a step, alone; it is the `whole` of what came in this turn."""
        self._read(data, whole=whole)

    def take_frames(self, messages: Sequence[bytes], *, whole: bool = False) -> None:
        """Takes messages that hold frames, as one where that goes; they are the `whole` of what came in this turn."""
        frames: list[session_pb2.StepFrame] = []
        for data in messages:
            request = self._parsed(data)
            if request is None:
                return
            if request.WhichOneof("kind") == "frame":
                frames.append(request.frame)
                continue
            # A message with several kinds in it is of the last, which its first byte does not tell.
            self._steps.frames(frames, whole=False)
            frames, whole = [], False
            self.request(request, whole=False)
        self._steps.frames(frames, whole=whole)

    def half_close(self) -> None:
        """The client sends no more: detach all, answer what was accepted, then end."""
        self._catch_up()
        self._lingering = False
        self._end()

    # ------------------------------------------------------------ from the server

    def go_away(self, grace_s: float) -> None:
        """The server stops in `grace_s` seconds: say so, detach all, answer what was accepted, then end.

        It ends once the client half-closes, or at `stop_lingering`: a call that ends under a client's write costs that
        client the answers that it has not read.
        """
        self._catch_up()
        self.say(
            session_pb2.StreamResponse(
                go_away=session_pb2.GoAway(grace=duration(grace_s), resume_token=self._seating.resume_token(grace_s))
            )
        )
        self._lingering = not self.ending
        self._end()

    def stop_lingering(self) -> None:
        """The client had the time to half-close."""
        if self._lingering:
            self.half_close()

    def broken(self) -> None:
        """The call is gone. Sessions live on, and what was accepted is run and recorded."""
        self._catch_up()
        self.is_broken = True
        self.outlet.close()
        # The seats stay: a step in the air that is asked about later names one as its answer's address.
        if self._presence is not None:
            self._presence.end(self.seats.values())
        self._core.directory.abandon(self.seats.values(), self._core.now())
        self.rows.clear()
        self._held()
        self._steps.forget()

    # ------------------------------------------------------------ from the core

    def slept(self, event: Slept) -> None:
        """A session's state is in the store alone: its next step brings it back."""
        seat = event.attachment
        if not self.is_broken and self.seats.get(seat.handle) is seat:
            self.moved(seat.handle, None)
            self._seating.slept(seat.handle, event.refused_seq)

    def detached(self, event: Detached) -> None:
        """A session left the stream; its handle is free."""
        attachment = event.attachment
        if self.is_broken or self.seats.get(attachment.handle) is not attachment:
            return
        del self.seats[attachment.handle]
        if self._presence is not None:
            self._presence.left(attachment.handle, event.applied_seq)
        self._seating.left(attachment.handle)
        self.rows.pop(attachment.handle, None)
        self._held()
        self._steps.forget()
        message = session_pb2.SessionDetached(
            handle=attachment.handle,
            cause=event.cause,
            session_id=self._seating.caller.shown(attachment.session.id),
            applied_seq=event.applied_seq,
        )
        self.about(attachment.handle, session_pb2.StreamResponse(detached=message))

    def attached(self, seat: Attachment) -> None:
        """A session has come, under its handle."""
        self.seats[seat.handle] = seat
        if self._presence is not None:
            self._presence.attached(seat)
        self.moved(seat.handle, seat.session)

    def _single(self, seat: Attachment, answer: Answer) -> None:
        if self.holds(seat):
            self._replies.single(seat.handle, answer)

    def _framed(self, seat: Attachment, answer: Answer) -> None:
        if self.holds(seat):
            self.expect_flush()
            self._replies.framed(seat.handle, answer)

    def moved(self, handle: int, session: Session | None) -> None:
        """The handle's session has a row in the table from now on; None: it has none."""
        if session is None:
            self.rows.pop(handle, None)
        else:
            self.rows[handle] = session.row
        self._held()
        self._steps.forget()

    def _held(self) -> None:
        """The stream holds other sessions than before."""
        self.handle, self.row = next(iter(self.rows.items())) if len(self.rows) == 1 else (-1, -1)

    def holds(self, seat: Attachment) -> bool:
        """The session is the stream's still, and it is told what becomes of it."""
        # A session that left may still have had a step under way: its answer is recorded, and not told here.
        return not self.is_broken and self.seats.get(seat.handle) is seat

    def single(self, handle: int) -> object:
        """The `reply_to` of steps under this handle that are answered by StepResults."""
        seat = self.seats.get(handle)
        return NOBODY if seat is None else self.reply_to(seat)

    def reply_to(self, seat: Attachment, *, framed: bool = False) -> Reply:
        """The `reply_to` of steps of a session that the stream holds."""
        return Reply(seat, self._framed if framed else self._single)

    def framed(self, handle: int) -> object:
        """The `reply_to` of steps under this handle that are answered in ResultFrames."""
        seat = self.seats.get(handle)
        return NOBODY if seat is None else self.reply_to(seat, framed=True)

    # ------------------------------------------------------------ requests

    def _steps_ahead(self) -> int:
        """Steps of the stream's only session that are read and not applied."""
        return self._intake.count(self) + self.seats[self.handle].session.steps_ahead

    def _catch_up(self) -> None:
        """Hands out the stream's steps of this turn that came before what comes now."""
        if len(self._intake):
            self._intake.flush(self)

    def _read(self, data: bytes, *, whole: bool = False) -> None:
        request = self._parsed(data)
        if request is not None:
            self.request(request, whole=whole)

    def _parsed(self, data: bytes) -> session_pb2.StreamRequest | None:
        """The message, or None: it is none, and the stream fails."""
        try:
            return session_pb2.StreamRequest.FromString(data)
        except DecodeError:
            message = "a message of the stream is no StreamRequest: send what session.proto describes"
            self.outlet.fail(to_status(Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "message"})))
            return None

    def request(self, request: session_pb2.StreamRequest, *, whole: bool = False) -> None:
        """Does what a message asks for; it is the `whole` of what came in this turn."""
        kind = request.WhichOneof("kind")
        self._catch_up()
        if self._seating.awaits and self._seating.takes(request):
            return
        if kind == "step":
            self._steps.step(request.step, whole=whole)
        elif kind == "frame":
            self._steps.frames([request.frame], whole=False)
        elif kind == "attach":
            self._seating.attach(request.attach)
        elif kind == "detach":
            self._detach(request.detach.handle)
        elif kind == "close":
            self._close(request.close.handle)
        elif kind == "flush":
            self._seating.flush(request.flush.handle)
        else:
            message = (
                "the message holds nothing that this server knows: send attach, step, frame, flush, detach or close"
            )
            self.refuse(0, 0, Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "kind"}))

    def _detach(self, handle: int) -> None:
        seat = self.seat(handle)
        if isinstance(seat, Fault):
            self.refuse(handle, 0, seat)
            return
        seat.leave()
        self._core.directory.detach(seat, self._core.now())

    def _close(self, handle: int) -> None:
        seat = self.seat(handle)
        if isinstance(seat, Fault):
            self.refuse(handle, 0, seat)
            return
        if seat.session.asleep:
            request = session_pb2.StreamRequest(close=session_pb2.CloseAttachedSession(handle=handle))
            if not self._seating.wakes((seat,), request):
                self.refuse(handle, 0, self._seating.why_away(seat))
            return
        seat.leave()
        self._core.directory.close(seat.session, self.reply_to(seat), self._core.now())

    def seat(self, handle: int) -> Attachment | Fault:
        """The session that a handle stands for, or why there is none."""
        seat = self.seats.get(handle)
        if seat is not None and not seat.leaving:
            return seat
        if self._lingering:
            return stopping(self._core.directory.limits.retry_s)
        what = "is being let go" if seat is not None else "is not attached"
        text = f"handle {handle} {what} on this stream: attach a session under it first"
        return Fault(e.ERROR_REASON_HANDLE_UNKNOWN, text, {"handle": str(handle)})

    # ------------------------------------------------------------ messages

    def _end(self) -> None:
        if self.is_broken:
            return
        if not self.ending:
            self.ending = True
            for seat in list(self.seats.values()):
                # What still comes for it is refused here: the session's own refusal would follow its SessionDetached.
                seat.leave()
                self._core.directory.detach(seat, self._core.now())
        self.expect_flush()
        self._core.kick()

    def refuse(self, handle: int, seq: int, fault: Fault) -> None:
        """Refuses a step, an attach or something else of a handle."""
        self.expect_flush()
        self._replies.error(handle, seq, fault)

    def _send(self, message: session_pb2.StreamResponse) -> None:
        if message.HasField("error"):
            self.refused(message.error.status)
        self.say(message)

    def refused(self, status: status_pb2.Status, count: int = 1) -> None:
        """So many steps, or one other thing, are refused: counts them."""
        self._metrics.refused(status, count)
        if self.trace is not None:
            self.trace.refused(status, count)

    def say(self, message: session_pb2.StreamResponse) -> None:
        """Says something, behind what was said before."""
        self.outlet.put(message.SerializeToString())

    def _put_bytes(self, message: bytes) -> None:
        # The outlet may be another by now than it was at first.
        self.outlet.put(message)

    def about(self, handle: int, message: session_pb2.StreamResponse) -> None:
        """Says something of a session, behind its answers."""
        self.expect_flush()
        self._replies.about(handle, message)

    def expect_flush(self) -> None:
        """What was said is sent, and the stream ends if that is due, at the end of the turn."""
        if not self._routed:
            self._routed = True
            self._core.after_routing(self._flush)

    def _flush(self) -> None:
        self._routed = False
        self._replies.flush()
        if self.ending and not self.seats and not self._lingering and not self._seating.awaits:
            self.say(session_pb2.StreamResponse(end=session_pb2.StreamEnd()))
            self.outlet.close()
