"""One session on a stream: attached, stepped, flushed and left, and all that again after a cut.

Invariant: however often a step is sent, the server applies it once, and each answer settles one ticket. Where the
server's store is written later than answers leave (durability ASYNC), steps are kept until it has them, and sent again
to a server that lacks them.
"""

from collections.abc import Sequence
from typing import Any

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.answer import answer_of
from conveyor._core.attachment import Attachment
from conveyor._core.frame import Frame, Handles, Seqs
from conveyor._core.member import Leaving, Outlet
from conveyor._core.retry import PASSING, waits
from conveyor._core.signature import Prepared, Signature
from conveyor._core.step import Parcel, Step
from conveyor._core.steps import Steps
from conveyor._core.ticket import Ticket
from conveyor._core.unstored import RESEND_BUFFER_BYTES
from conveyor._core.verdict import Verdict
from conveyor.errors import ClientClosed, ConnectionLost, ConveyorError, ProtocolError, SessionNotFound


class SessionCore:
    """The client's half of one session. Belongs to one StreamCore; every call is under its link's lock.

    Attributes:
        opened: settled by the first attach.
        left: settled once the session is closed or detached, as `leave` asked.
        error: why nothing can be asked of it any more, or None.
    """

    def __init__(self, attachment: Attachment, outlet: Outlet, resend_buffer_bytes: int = RESEND_BUFFER_BYTES) -> None:
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
        self._steps = Steps(attachment, resend_buffer_bytes)
        self._unstored = self._steps.unstored

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
        return self._steps.applied_seq

    @property
    def durable_seq(self) -> int:
        """The last step that is in the server's store, as far as was heard; 0 without a store."""
        return self._unstored.durable

    @property
    def full(self) -> bool:
        """The store lacks so much that nothing more may be submitted."""
        return self._unstored.full

    def blocker(self) -> Ticket[Any] | None:
        """What to wait for before `submit` may be called; None: nothing.

        Raises:
            ConveyorError: the session has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self._steps.blocker()

    def submit(self, prepared: Prepared, timeout_ms: int = 0) -> Step:
        """Numbers a step, to be sent with the next message, or with the next stream. Only where `blocker` gave None."""
        step = self._steps.submit(prepared, timeout_ms)
        self._offer()
        return step

    def flush(self) -> Ticket[int]:
        """Settled with `durable_seq` once that is at least what `applied_seq` is now.

        Raises:
            NotDurable: the session is kept in no store.
            ConveyorError: the session has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if not self._unstored.stored:
            raise self.attachment.not_durable()
        ticket = self._unstored.flush(self.applied_seq)
        self._send_flush()
        return ticket

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, the session once its steps are answered and, to detach, stored."""
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
        self._steps.end(error)
        self.opened.fail(error)
        self.left.fail(error)

    # ------------------------------------------------------------ Member: told by the stream

    @property
    def handles(self) -> range:
        return range(self.attachment.handle, self.attachment.handle + 1)

    @property
    def busy(self) -> bool:
        return self.error is None and (self._owes or self._unstored.waited_for)

    @property
    def unanswered(self) -> bool:
        return bool(self._steps.window) or self._steps.window.again

    @property
    def unstored(self) -> bool:
        return self._unstored.keeps and self._steps.pending

    @property
    def gone(self) -> bool:
        return self.error is not None

    def attach(self) -> None:
        self._present, self._said_goodbye, self._unstored.flushing = True, False, False
        self._outlet.send(self.attachment.request(self.applied_seq if self.opened.done else 0))

    def attached(self, message: pb.SessionAttached) -> None:
        error = self.attachment.accept(message)
        first = not self.opened.done
        if error is None and not first:
            error = self._steps.check(message.session.applied_seq)
        if error is not None:
            self.end(error)
            return
        self._sending = True
        self._steps.begin(message.session, first=first)
        self.opened.resolve(message.session)
        self._go_on()

    def take(self) -> Parcel | None:
        """The steps of this session that go in the next message."""
        if not self._sending or self._signature is None:
            return None
        parcel = self._steps.take(self._signature)
        if parcel is not None:
            self._offer()
            self._send_leave()
        return parcel

    def result(self, message: pb.StepResult) -> None:
        self._steps.answered(message.seq, answer_of(message))
        if self._unstored.stored and message.HasField("durable_seq"):
            self._unstored.moved(message.durable_seq)
        self._heard()

    def owns(self, frame: Frame) -> bool:
        return frame.handle_bytes == frame.handle_bytes[:4] * frame.rows

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        for seq, answer in frame.answers(range(frame.rows) if rows is None else rows, self._timed):
            self._steps.answered(seq, answer)
        if self._unstored.stored and frame.durables is not None:
            durables = frame.durables if rows is None else frame.durables[rows]
            self._unstored.moved(int(durables.max()))
        self._heard()

    def stored(self, handles: Handles, seqs: Seqs) -> None:  # noqa: ARG002
        self._unstored.flushing = False
        self._unstored.moved(int(seqs.max()))
        self._send_flush()

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:  # noqa: ARG002
        if seq == 0:
            return self._refused(error)
        kind = self._steps.refused(seq, error, held=not self._present)
        if kind is Verdict.ENDED:
            self._present = False
            self.end(error)
        elif kind is Verdict.LOST:
            self.end(self.attachment.unrepeatable(seq, error))
        else:
            if kind is Verdict.RESEND or kind is Verdict.LATER:
                self._sending = False
            self._heard()
            self._send_leave()
        return kind is Verdict.RESEND

    def detached(self, message: pb.SessionDetached) -> None:
        present, self._present = self._present, False
        self._sending = False
        unasked = message.cause == pb.DETACH_CAUSE_DETACHED and self._leaving is None
        if unasked and not present:
            # The answer to our half-close: the next stream attaches again.
            return
        if self._leaving is None or message.cause == pb.DETACH_CAUSE_TAKEN_OVER:
            self.end(self.attachment.lost(message.cause))
            return
        if self._unstored.stored and message.cause == pb.DETACH_CAUSE_DETACHED:
            self._unstored.moved(message.applied_seq)
        self._leave_done()

    def retry(self, handles: Sequence[int]) -> None:  # noqa: ARG002
        if not self._present:
            return
        if not self._sending and self._steps.setback.error is None:
            self._outlet.send(self.attachment.request(self.applied_seq if self.opened.done else 0))
            return
        if self._steps.told:
            self._steps.retry()
            self._sending = True
        # A flush or a goodbye may be what was refused; both can be asked for twice.
        self._unstored.flushing = self._said_goodbye = False
        self._go_on()

    def give_up(self, handle: int, error: ConveyorError) -> None:  # noqa: ARG002
        if not self._owes:
            self._unstored.refuse(error)
            return
        if self._steps.window.again and isinstance(error, ConnectionLost):
            error = self.attachment.unrepeatable(self._steps.window.first_again, error)
        self.end(error)

    def move(self, resume_token: str) -> None:
        self.attachment.resume_token = resume_token

    def hold(self) -> None:
        self._present = self._sending = False

    def suspend(self) -> None:
        self._present = self._sending = False
        self._steps.suspend()
        if self._leaving is Leaving.DETACH and not self.unstored:
            # A lost stream is a detach, where nobody but this client has what must not be lost.
            self._leave_done()

    def abandon(self, error: ConveyorError) -> None:
        if self.busy:
            self.end(error)

    # ------------------------------------------------------------ rules

    @property
    def _owes(self) -> bool:
        """Somebody waits for an answer, the opening or the end."""
        return bool(self._steps.window) or not self.opened.done or self._leaving is not None

    def _refused(self, error: ConveyorError) -> bool:
        """An attach, flush, detach or close was refused."""
        if not self._present:
            # The stream takes no more, and what was not done is asked of the next one.
            return True
        if waits(error.reason, opened=self.opened.done):
            self._outlet.postpone(self.attachment.handle, error)
            return False
        if self._unstored.flushing and error.reason == "NOT_DURABLE":
            # It is not asked for another time.
            self._unstored.refuse(error)
            return False
        if not self._sending and error.reason in PASSING and (self.opened.done or error.reason == "DRAINING"):
            return True
        if self._leaving is not None and isinstance(error, SessionNotFound):
            # What was asked is so, even if not by this request.
            self._leave_done()
            return False
        self._present = False
        self.end(error)
        return False

    def _go_on(self) -> None:
        """Sends what there is to send on a stream that takes it."""
        self._offer()
        self._send_flush()
        self._send_leave()

    def _heard(self) -> None:
        """Some step was answered or refused: others may follow."""
        self._offer()
        if self._unstored.stored:
            self._send_flush()
        error = self._steps.setback.error
        if error is not None and self._present and self._steps.told:
            self._outlet.postpone(self.attachment.handle, error)

    def _offer(self) -> None:
        """Asks to be asked by `take`, where that would give something."""
        if self._sending and self._steps.window.may_send():
            self._outlet.offer(self)

    def _send_flush(self) -> None:
        """Asks the server to store what is answered, where that is wanted and the server has it all."""
        if self._sending and not self._said_goodbye and not self._steps.window.again and self._unstored.wants_flush:
            self._unstored.flushing = True
            self._outlet.send(self.attachment.flush())

    def _send_leave(self) -> None:
        """Says goodbye to this stream, where that was asked for, behind the last step."""
        if self._leaving is None or self._said_goodbye:
            return
        if self._sending and not self._steps.window.unsent:
            self._said_goodbye = True
            self._outlet.send(self.attachment.goodbye(close=self._leaving is Leaving.CLOSE))

    def _leave_done(self) -> None:
        self.left.resolve(None)
        what = "closed" if self._leaving is Leaving.CLOSE else "detached"
        self.end(ClientClosed(f"session {self.attachment.session_id!r} was {what} by this client"))
