"""One session on a stream: numbers its steps, keeps what is unanswered, and sends it again after a cut.

Invariant: a step's number and content are bound to each other from `submit` until it is answered, so however often it
is sent the server applies it once; each answer settles one ticket.
"""

from collections.abc import Iterable, Sequence
from enum import Enum, auto

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.answer import Answer, answer_of
from conveyor._core.attachment import Attachment
from conveyor._core.frame import Frame
from conveyor._core.member import Outlet
from conveyor._core.retry import PASSING
from conveyor._core.signature import Prepared, Signature
from conveyor._core.step import Parcel, Step
from conveyor._core.ticket import Ticket
from conveyor._core.verdict import Verdict, verdict
from conveyor._core.window import Window
from conveyor.errors import (
    ClientClosed,
    ConveyorError,
    ProtocolError,
    SessionNotFound,
)


class Leaving(Enum):
    """How the client lets go of a session."""

    DETACH = auto()
    CLOSE = auto()


class SessionCore:
    """The client's half of one session. Belongs to one StreamCore; every call is under its link's lock.

    Attributes:
        opened: settled by the first attach.
        left: settled once the session is closed or detached, as `leave` asked.
        error: why nothing can be asked of it any more, or None.
    """

    def __init__(self, attachment: Attachment, outlet: Outlet) -> None:
        self.attachment = attachment
        self.opened: Ticket[pb.SessionInfo] = Ticket()
        self.left: Ticket[None] = Ticket()
        self.error: ConveyorError | None = None
        self._outlet = outlet
        self._signature: Signature | None = None
        # The model's outputs that have time.
        self._timed: tuple[bool, ...] = ()
        # The stream that is open now got our attach, and still takes messages.
        self._present = False
        # And granted it: steps may be sent.
        self._sending = False
        self._leaving: Leaving | None = None
        self._said_goodbye = False
        self._next_seq = 1
        self._window = Window()
        # Steps from _next_seq on follow a refused one and await their own refusal.
        self._stalled = False
        # Steps that may be unanswered.
        self._credit = 1
        # The first step that this stream refused and the next one shall take.
        self._resend_from: int | None = None

    # ------------------------------------------------------------ asked by the client

    @property
    def info(self) -> pb.SessionInfo:
        """What the server said at the last attach."""
        if self.attachment.info is None:
            raise ProtocolError("the session is not attached yet")
        return self.attachment.info

    def use(self, signature: Signature) -> None:
        """Sets the model's signature, before the first `submit`."""
        self._signature = signature
        self._timed = tuple(field.has_time for field in signature.outputs)

    @property
    def applied_seq(self) -> int:
        """Steps whose answers are here: all before the first one that is unanswered."""
        if not self._window:
            return self._next_seq - 1
        return min(self._window.oldest.seq, self._next_seq) - 1

    def blocker(self) -> Ticket[Answer] | None:
        """What to wait for before `submit` may be called; None: nothing.

        Raises:
            ConveyorError: the session has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._stalled:
            if self._window and self._window.newest.seq >= self._next_seq:
                return self._window.newest.ticket
            self._stalled = False
        if len(self._window) >= self._credit:
            return self._window.oldest.ticket
        return None

    def submit(self, prepared: Prepared, timeout_ms: int = 0) -> Step:
        """Numbers a step, to be sent with the next message, or with the next stream. Only where `blocker` gave None."""
        step = Step(self._next_seq, prepared, timeout_ms, Ticket())
        self._window.add(step)
        self._next_seq += 1
        self._offer()
        return step

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, the session once its steps are answered."""
        if self.error is None and self._leaving is None:
            self._leaving = how
            self._send_leave()
        return self.left

    def end(self, error: ConveyorError) -> None:
        """Ends this object, not the session: whoever waits gets `error`, and so does every later call."""
        if self.error is not None:
            return
        self.error = error
        if self._present and self._leaving is None:
            # A session that was only just created is of no use to anybody.
            close = not self.opened.done and self.attachment.creates
            self._outlet.send(self.attachment.goodbye(close=close))
        self._present = self._sending = False
        for step in self._window.drop_all():
            step.ticket.fail(error)
        self.opened.fail(error)
        self.left.fail(error)

    # ------------------------------------------------------------ Member: told by the stream

    @property
    def handles(self) -> range:
        return range(self.attachment.handle, self.attachment.handle + 1)

    @property
    def busy(self) -> bool:
        return self.error is None and (bool(self._window) or not self.opened.done or self._leaving is not None)

    @property
    def unanswered(self) -> bool:
        return bool(self._window)

    @property
    def gone(self) -> bool:
        return self.error is not None

    def attach(self) -> None:
        self._present, self._said_goodbye = True, False
        self._window.rewind()
        self._outlet.send(self.attachment.request())

    def attached(self, message: pb.SessionAttached) -> None:
        error = self.attachment.accept(message)
        self._sending = True
        applied = message.session.applied_seq
        if error is None and self.opened.done:
            newest = self._window.newest.seq if self._window else self._next_seq - 1
            error = self.attachment.check_progress(applied, self.applied_seq, newest)
        if error is not None:
            self.end(error)
            return
        self._credit = max(1, message.session.max_in_flight)
        if not self.opened.done:
            self._next_seq = applied + 1
        self.opened.resolve(message.session)
        self._offer()
        self._send_leave()

    def take(self) -> Parcel | None:
        """The steps of this session that go in the next message."""
        steps = self._window.take(self._credit) if self._sending else ()
        if not steps or self._signature is None:
            return None
        self._offer()
        self._send_leave()
        return Parcel(self._signature, self.attachment.handle, self.applied_seq, steps)

    def result(self, message: pb.StepResult) -> None:
        step = self._window.pop(message.seq)
        if step is not None:
            step.ticket.resolve(answer_of(message))
        self._offer()

    def owns(self, frame: Frame) -> bool:
        return frame.handle_bytes == frame.handle_bytes[:4] * frame.rows

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        for seq, answer in frame.answers(range(frame.rows) if rows is None else rows, self._timed):
            step = self._window.pop(seq)
            if step is not None:
                step.ticket.resolve(answer)
        self._offer()

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:  # noqa: ARG002
        if seq == 0:
            return self._refused(error)
        step = self._window.find(seq)
        if step is None:
            return False
        kind = verdict(error, held=not self._present)
        if kind is Verdict.ENDED:
            self._present = False
            self.end(error)
            return False
        if kind is Verdict.RESEND:
            self._resend_from = min(seq, self._resend_from or seq)
            self._sending = False
            return True
        if kind is Verdict.ABORTED and self._resend_from is not None and seq > self._resend_from:
            return False
        self._window.pop(seq)
        step.ticket.fail(error)
        if kind is not Verdict.APPLIED:
            self._next_seq = min(self._next_seq, seq, int(error.metadata.get("next_seq", seq)))
            self._stalled = True
            # No stream was given these, and none shall be: the server would refuse them like those that it has.
            self._abort(self._window.drop_unsent())
            self._send_leave()
        self._offer()
        return False

    def detached(self, message: pb.SessionDetached) -> None:
        present, self._present = self._present, False
        self._sending = False
        unasked = message.cause == pb.DETACH_CAUSE_DETACHED and self._leaving is None
        if unasked and not present:
            # The answer to our half-close: the next stream attaches again.
            return
        if self._leaving is None or message.cause == pb.DETACH_CAUSE_TAKEN_OVER:
            self.end(self.attachment.lost(message.cause))
        else:
            self._leave_done()

    def hold(self) -> None:
        self._present = self._sending = False

    def suspend(self) -> None:
        self._present = self._sending = False
        self._resend_from = None
        self._abort(self._window.drop_from(self._next_seq))
        if self._leaving is Leaving.DETACH:
            # A lost stream is a detach.
            self._leave_done()

    def abandon(self, error: ConveyorError) -> None:
        if self.busy:
            self.end(error)

    # ------------------------------------------------------------ rules

    def _refused(self, error: ConveyorError) -> bool:
        """An attach, detach or close was refused."""
        if not self._present:
            # The stream takes no more, and what was not done is asked of the next one.
            return True
        if not self._sending and error.reason in PASSING and (self.opened.done or error.reason == "DRAINING"):
            return True
        if self._leaving is not None and isinstance(error, SessionNotFound):
            # What was asked is so, even if not by this request.
            self._leave_done()
            return False
        self._present = False
        self.end(error)
        return False

    def _offer(self) -> None:
        """Asks to be asked by `take`, where that would give something."""
        if self._sending and self._window.may_send():
            self._outlet.offer(self)

    def _send_leave(self) -> None:
        """Says goodbye to this stream, where that was asked for, behind the last step."""
        if self._leaving is None or self._said_goodbye:
            return
        if self._sending and not self._window.unsent:
            self._said_goodbye = True
            self._outlet.send(self.attachment.goodbye(close=self._leaving is Leaving.CLOSE))

    def _abort(self, steps: Iterable[Step]) -> None:
        for step in steps:
            step.ticket.fail(self.attachment.aborted(step.seq, self._next_seq))

    def _leave_done(self) -> None:
        self.left.resolve(None)
        what = "closed" if self._leaving is Leaving.CLOSE else "detached"
        self.end(ClientClosed(f"session {self.attachment.session_id!r} was {what} by this client"))
