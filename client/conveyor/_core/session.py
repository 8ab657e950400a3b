"""One session on a stream: numbers its steps, keeps what is unanswered, and sends it again after a cut.

Invariant: a step's number and content are bound to each other from `submit` until it is answered, so however often it
is sent the server applies it once; each answer settles one ticket.
"""

from dataclasses import dataclass
from enum import Enum, auto

from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2

from conveyor._core.attachment import Attachment
from conveyor._core.frame import Rows
from conveyor._core.member import Send
from conveyor._core.retry import PASSING
from conveyor._core.ticket import Ticket
from conveyor._core.verdict import Verdict, verdict
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


@dataclass(slots=True)
class _Unanswered:
    request: pb.StreamRequest
    ticket: Ticket[pb.StepResult]


class SessionCore:
    """The client's half of one session. Belongs to one StreamCore; every call is under its link's lock.

    Attributes:
        opened: settled by the first attach.
        left: settled once the session is closed or detached, as `leave` asked.
        error: why nothing can be asked of it any more, or None.
    """

    def __init__(self, attachment: Attachment, send: Send) -> None:
        self.attachment = attachment
        self.opened: Ticket[pb.SessionInfo] = Ticket()
        self.left: Ticket[None] = Ticket()
        self.error: ConveyorError | None = None
        self._send_request = send
        # The stream that is open now got our attach, and still takes messages.
        self._present = False
        # And granted it: steps may be sent.
        self._sending = False
        self._leaving: Leaving | None = None
        self._next_seq = 1
        # In order of seq. Those from _next_seq on follow a refused step and await their own refusal.
        self._window: dict[int, _Unanswered] = {}
        # The first step that this stream refused and the next one shall take.
        self._resend_from: int | None = None

    # ------------------------------------------------------------ asked by the client

    @property
    def info(self) -> pb.SessionInfo:
        """What the server said at the last attach."""
        if self.attachment.info is None:
            raise ProtocolError("the session is not attached yet")
        return self.attachment.info

    @property
    def applied_seq(self) -> int:
        """Steps whose answers are here: all before the first one that is unanswered."""
        return min(min(self._window, default=self._next_seq), self._next_seq) - 1

    def blocker(self) -> Ticket[pb.StepResult] | None:
        """What to wait for before `submit` may be called; None: nothing.

        Raises:
            ConveyorError: the session has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._window:
            newest = next(reversed(self._window))
            if newest >= self._next_seq:
                return self._window[newest].ticket
            if len(self._window) >= max(1, self.info.max_in_flight):
                return self._window[next(iter(self._window))].ticket
        return None

    def submit(self, inputs: list[tensor_pb2.Tensor], timeout_ms: int = 0) -> Ticket[pb.StepResult]:
        """Numbers a step and sends it now, or with the next stream. Only where `blocker()` gave None."""
        step = pb.Step(
            handle=self.attachment.handle,
            seq=self._next_seq,
            inputs=inputs,
            timeout_ms=timeout_ms,
            acked_seq=self.applied_seq,
        )
        entry = _Unanswered(pb.StreamRequest(step=step), Ticket())
        self._window[self._next_seq] = entry
        self._next_seq += 1
        if self._sending:
            self._send_request(entry.request)
        return entry.ticket

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, the session once its steps are answered."""
        if self.error is None and self._leaving is None:
            self._leaving = how
            if self._sending:
                self._send_leave(close=how is Leaving.CLOSE)
        return self.left

    def end(self, error: ConveyorError) -> None:
        """Ends this object, not the session: whoever waits gets `error`, and so does every later call."""
        if self.error is not None:
            return
        self.error = error
        if self._present and self._leaving is None:
            # A session that was only just created is of no use to anybody.
            self._send_leave(close=not self.opened.done and self.attachment.creates)
        self._present = self._sending = False
        window, self._window = self._window, {}
        for entry in window.values():
            entry.ticket.fail(error)
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
        self._present = True
        self._send_request(self.attachment.request())

    def attached(self, message: pb.SessionAttached) -> None:
        error = self.attachment.accept(message)
        self._sending = True
        applied = message.session.applied_seq
        if error is None and self.opened.done:
            newest = max(self._window, default=self._next_seq - 1)
            error = self.attachment.check_progress(applied, self.applied_seq, newest)
        if error is not None:
            self.end(error)
            return
        if not self.opened.done:
            self._next_seq = applied + 1
        self.opened.resolve(message.session)
        for entry in self._window.values():
            entry.request.step.acked_seq = self.applied_seq
            self._send_request(entry.request)
        if self._leaving is not None:
            self._send_leave(close=self._leaving is Leaving.CLOSE)

    def result(self, message: pb.StepResult) -> None:
        entry = self._window.pop(message.seq, None)
        if entry is not None:
            entry.ticket.resolve(message)

    def rows(self, rows: Rows) -> None:
        seqs = rows.seqs[rows.mine].tolist()
        self.end(ProtocolError(f"steps {seqs} were sent alone and answered in a frame"))

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:  # noqa: ARG002
        if seq == 0:
            return self._refused(error)
        entry = self._window.get(seq)
        if entry is None:
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
        if kind is not Verdict.APPLIED:
            self._next_seq = min(self._next_seq, seq, int(error.metadata.get("next_seq", seq)))
        del self._window[seq]
        entry.ticket.fail(error)
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
        for seq in [seq for seq in self._window if seq >= self._next_seq]:
            self._window.pop(seq).ticket.fail(self.attachment.aborted(seq, self._next_seq))
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

    def _send_leave(self, *, close: bool) -> None:
        self._send_request(self.attachment.goodbye(close=close))

    def _leave_done(self) -> None:
        self.left.resolve(None)
        what = "closed" if self._leaving is Leaving.CLOSE else "detached"
        self.end(ClientClosed(f"session {self.attachment.session_id!r} was {what} by this client"))
