"""Many sessions on a stream, stepped together in frames. The rules are a session's, held in arrays: one entry per row.

Invariant: as in `session`, per row. A frame's ticket settles when each of its rows was answered or refused; a row that
fails stops no other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.attachment import Attachment, Claim
from conveyor._core.batch import Batch
from conveyor._core.flushes import Flushes
from conveyor._core.frame import Frame, Handles, Seqs
from conveyor._core.frame_step import FrameStep
from conveyor._core.frames import Frames
from conveyor._core.member import Leaving, Outlet
from conveyor._core.retry import PASSING, waits
from conveyor._core.rows import Rows
from conveyor._core.ticket import Ticket
from conveyor._core.unstored import RESEND_BUFFER_BYTES
from conveyor._core.verdict import FOLLOWS, Verdict, verdict
from conveyor.errors import ClientClosed, ConnectionLost, ConveyorError

# A row that is gone lacks nothing.
_NOTHING = np.iinfo(np.uint64).max


class PopulationCore(Rows):
    """The client's half of many sessions. Belongs to one StreamCore; every call is under its link's lock.

    Attributes:
        attachments: one per row.
        opened: settled once every row was attached for the first time, or fails with the first row's refusal.
        left: settled once every row is closed or detached, as `leave` asked.
        error: why nothing can be asked of it any more, or None.
    """

    def __init__(
        self,
        handles: range,
        claims: Sequence[Claim],
        outlet: Outlet,
        resend_buffer_bytes: int = RESEND_BUFFER_BYTES,
    ) -> None:
        super().__init__(Frames(handles, resend_buffer_bytes))
        self.attachments = [Attachment(handle, claim) for handle, claim in zip(handles, claims, strict=True)]
        self.opened: Ticket[pb.SessionInfo] = Ticket()
        self.left: Ticket[None] = Ticket()
        self.error: ConveyorError | None = None
        self._handles = handles
        self._outlet = outlet
        self._flushes = Flushes(self._frames)
        # Where the servers had the rows at their last attach.
        self._applied: Seqs = np.zeros(len(handles), np.uint64)
        # The stream that is open now got our attaches, and still takes messages.
        self._present = False
        # Rows whose attach is unanswered on this stream; when there are none, steps may be sent.
        self._attaching: set[int] = set()
        self._leaving: Leaving | None = None
        self._said_goodbye = False

    # ------------------------------------------------------------ asked by the client

    def blocker(self, rows: NDArray[np.intp]) -> Ticket[Any] | None:
        """What to wait for before `submit` may be called for these rows; None: nothing.

        Raises:
            ConveyorError: the population has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self._frames.blocker(rows)

    def submit(self, rows: NDArray[np.intp], batch: Batch, timeout_ms: int = 0) -> FrameStep:
        """Numbers a step of some rows and sends it now, or with the next stream. Only where `blocker` gave None."""
        step = self._frames.submit(rows, batch, timeout_ms)
        self._go_on()
        return step

    def flush(self) -> Ticket[Seqs]:
        """Settled with `durable` once every row is stored up to what `acked` says now; rows that are gone are left out.

        Raises:
            NotDurable: a row is kept in no store.
            ConveyorError: the population has ended.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        for row in np.flatnonzero(~self._ledger.stored).tolist():
            if row not in self.row_errors:
                raise self.attachments[row].not_durable()
        ticket = self._flushes.ask()
        self._go_on()
        return ticket

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, every session once its steps are answered and, to detach, stored."""
        if self.error is None and self._leaving is None:
            self._leaving = how
            self._go_on()
            self._check_left()
        return self.left

    def end(self, error: ConveyorError) -> None:
        """Ends this object, not the sessions: whoever waits gets `error`, and so does every later call."""
        if self.error is not None:
            return
        self.error = error
        if self._present and self._leaving is None:
            for row, attachment in enumerate(self.attachments):
                if row not in self.row_errors:
                    self._send_goodbye(row, close=not self.opened.done and attachment.creates)
        self._present = False
        self._frames.end(error)
        self._flushes.refuse(error)
        self.opened.fail(error)
        self.left.fail(error)

    # ------------------------------------------------------------ Member: told by the stream

    @property
    def handles(self) -> range:
        return self._handles

    @property
    def busy(self) -> bool:
        return self.error is None and (self._owes or self._flushes.waited_for)

    @property
    def unanswered(self) -> bool:
        return bool(self._frames)

    @property
    def unstored(self) -> bool:
        return self._ledger.keeps and (bool(self._frames) or bool(self._frames.kept))

    @property
    def gone(self) -> bool:
        return self.error is not None

    def attach(self) -> None:
        self._present, self._said_goodbye = True, False
        self._attaching = set(range(len(self._handles))) - self.row_errors.keys()
        for row in sorted(self._attaching):
            self._outlet.send(self.attachments[row].request(int(self.acked[row])))

    def attached(self, message: pb.SessionAttached) -> None:
        row = message.handle - self._handles.start
        attachment = self.attachments[row]
        error = attachment.accept(message)
        applied = message.session.applied_seq
        if error is None and self.opened.done:
            sent = int(self._ledger.next_seqs[row]) - 1
            error = attachment.check_progress(applied, self._ledger.kept_from(row), int(self.acked[row]), sent)
        if error is not None:
            self._send_goodbye(row, close=False)
            self._lose_row(row, error)
        else:
            if not self.opened.done:
                self._ledger.begin(row, applied)
                self._flushes.secure(row, applied)
            self._ledger.granted(row, message.session)
            self._applied[row] = applied
        self._attach_answered(row)

    def result(self, message: pb.StepResult) -> None:
        self._frames.result(message)
        self._heard()

    def owns(self, frame: Frame) -> bool:
        return self._frames.owns(frame)

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        self._frames.rows(frame, rows)
        self._heard()

    def stored(self, handles: Handles, seqs: Seqs) -> None:
        rows = handles.astype(np.intp) - self._handles.start
        self._frames.stored(rows, seqs)
        self._flushes.answered(rows)
        self._heard()

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:
        row = handle - self._handles.start
        if seq == 0:
            return self._refused(row, error)
        held_from = int(self._ledger.resend_from[row])
        if error.reason in FOLLOWS and held_from and seq > held_from:
            self._frames.followed(row, error)
            self._heard((row,))
            return False
        again = self._frames.is_again(row, seq)
        kind = verdict(error, held=not self._present, again=again)
        if kind is Verdict.ENDED:
            self._lose_row(row, error)
        elif kind is Verdict.LOST:
            self._send_goodbye(row, close=False)
            self._lose_row(row, self.attachments[row].unrepeatable(seq, error))
        elif kind is Verdict.RESEND or kind is Verdict.LATER:
            self._frames.postpone(row, seq, error if kind is Verdict.LATER else None)
        else:
            if not again:
                if kind is Verdict.APPLIED:
                    self._ledger.skipped(row, seq)
                else:
                    self._ledger.refused(row, min(seq, int(error.metadata.get("next_seq", seq))))
            self._frames.fail(row, seq, error, applied=kind is Verdict.APPLIED)
        self._heard((row,))
        return kind is Verdict.RESEND

    def detached(self, message: pb.SessionDetached) -> None:
        row = message.handle - self._handles.start
        asked = message.cause == pb.DETACH_CAUSE_DETACHED
        if asked and self._leaving is None and not self._present:
            # The answer to our half-close: the next stream attaches again.
            return
        if asked and self._leaving is not None and self._ledger.stored[row]:
            self._frames.stored(np.array([row]), np.array([message.applied_seq], np.uint64))
        self._lose_row(row, self.attachments[row].lost(message.cause))

    def retry(self, handles: Sequence[int]) -> None:
        if not self._present:
            return
        rows = [row for handle in handles if (row := handle - self._handles.start) not in self.row_errors]
        for row in rows:
            if row in self._attaching:
                self._outlet.send(self.attachments[row].request(int(self.acked[row])))
            elif self._said_goodbye:
                # A goodbye may be what was refused; it can be said twice.
                self._send_goodbye(row, close=self._leaving is Leaving.CLOSE)
        told = [row for row in rows if self._frames.told(row)]
        self._frames.abort_rows(told, self._aborted)
        for request in self._frames.retry(told):
            self._outlet.send(request)
        self._flushes.answered(np.array(rows, np.intp))
        self._go_on()

    def give_up(self, handle: int, error: ConveyorError) -> None:
        row = handle - self._handles.start
        if not self.opened.done or self._leaving is not None:
            self.end(error)
        elif row in self._attaching:
            self._lose_row(row, error)
            self._attach_answered(row)
        elif (seq := self._frames.first(row)) is None:
            self._flushes.refuse(error)
        else:
            if isinstance(error, ConnectionLost) and self._frames.is_again(row, seq):
                error = self.attachments[row].unrepeatable(seq, error)
            self._send_goodbye(row, close=False)
            self._lose_row(row, error)
            self._heard()

    def move(self, resume_token: str) -> None:
        for attachment in self.attachments:
            attachment.resume_token = resume_token

    def hold(self) -> None:
        self._present = False

    def suspend(self) -> None:
        self._present = False
        self._attaching.clear()
        self._frames.abort(self._aborted)
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
        return bool(self._frames) or not self.opened.done or self._leaving is not None

    @property
    def _sending(self) -> bool:
        return self._present and not self._attaching

    def _refused(self, row: int, error: ConveyorError) -> bool:
        """An attach, flush, detach or close of one row was refused."""
        if not self._present:
            # The stream takes no more, and what was not done is asked of the next one.
            return True
        if waits(error.reason, opened=self.opened.done):
            self._outlet.postpone(self._handles[row], error)
            return False
        if row in self._attaching:
            if error.reason in PASSING and (self.opened.done or error.reason == "DRAINING"):
                return True
        elif error.reason == "NOT_DURABLE":
            self._flushes.refuse(error)
            return False
        self._lose_row(row, error)
        self._attach_answered(row)
        return False

    def _attach_answered(self, row: int) -> None:
        self._attaching.discard(row)
        if self._attaching or not self._present:
            return
        if not self.opened.done:
            if self.row_errors:
                self.end(next(iter(self.row_errors.values())))
                return
            self.opened.resolve(self.attachments[0].info or pb.SessionInfo())
        applied = self._applied.copy()
        applied[list(self.row_errors)] = _NOTHING
        self._frames.begin(applied)
        self._flushes.begin()
        # The attach has said how much the store has: it may be all that somebody waits for.
        self._flushes.check()
        self._go_on()

    def _aborted(self, row: int, refused: int, seq: int) -> ConveyorError:
        return self.attachments[row].aborted(seq, refused)

    def _lose_row(self, row: int, error: ConveyorError) -> None:
        """A row's session is gone: its steps fail, now and later."""
        if row in self.row_errors:
            return
        self._frames.fail_row(row, error)
        self._flushes.check()
        self._check_left()

    def _heard(self, rows: Sequence[int] | None = None) -> None:
        """Some rows were answered, stored or refused: others may follow. None: any of them."""
        setbacks = self._frames.setbacks
        if setbacks and self._present:
            for row in setbacks if rows is None else rows:
                if row in setbacks and self._frames.told(row):
                    self._outlet.postpone(self._handles[row], setbacks[row][0])
        if self._ledger.stores:
            self._flushes.check()
        if self._frames.unsent or self._ledger.stores:
            self._go_on()

    def _go_on(self) -> None:
        """Sends what there is to send on a stream that takes it."""
        if not self._sending:
            return
        for request in self._frames.take():
            self._outlet.send(request)
        if self._leaving is None:
            if not self._frames.again:
                for row in self._flushes.take():
                    self._outlet.send(self.attachments[row].flush())
        elif not self._frames.unsent and not self._said_goodbye:
            self._said_goodbye = True
            for row in range(len(self._handles)):
                if row not in self.row_errors:
                    self._send_goodbye(row, close=self._leaving is Leaving.CLOSE)

    def _send_goodbye(self, row: int, *, close: bool) -> None:
        self._outlet.send(self.attachments[row].goodbye(close=close))

    def _check_left(self) -> None:
        if self._leaving is not None and len(self.row_errors) == len(self._handles):
            self._leave_done()

    def _leave_done(self) -> None:
        self.left.resolve(None)
        what = "closed" if self._leaving is Leaving.CLOSE else "detached"
        self.end(ClientClosed(f"the population was {what} by this client"))
