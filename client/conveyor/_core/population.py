"""Many sessions on a stream, stepped together in frames. The rules are a session's, held in arrays: one entry per row.

Invariant: as in `session`, per row. A frame's ticket settles when each of its rows was answered or refused; a row that
fails stops no other.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.attachment import Attachment, Claim
from conveyor._core.batch import Batch
from conveyor._core.frame import Frame, Seqs
from conveyor._core.frame_step import FrameStep
from conveyor._core.frames import Frames
from conveyor._core.member import Send
from conveyor._core.retry import PASSING
from conveyor._core.session import Leaving
from conveyor._core.signature import Signature
from conveyor._core.ticket import Ticket
from conveyor._core.verdict import Verdict, verdict
from conveyor.errors import ClientClosed, ConveyorError


class PopulationCore:
    """The client's half of many sessions. Belongs to one StreamCore; every call is under its link's lock.

    Attributes:
        attachments: one per row.
        opened: settled once every row was attached for the first time, or fails with the first row's refusal.
        left: settled once every row is closed or detached, as `leave` asked.
        error: why nothing can be asked of it any more, or None.
    """

    def __init__(self, handles: range, claims: Sequence[Claim], send: Send) -> None:
        self.attachments = [Attachment(handle, claim) for handle, claim in zip(handles, claims, strict=True)]
        self.opened: Ticket[pb.SessionInfo] = Ticket()
        self.left: Ticket[None] = Ticket()
        self.error: ConveyorError | None = None
        self._handles = handles
        self._send_request = send
        self._signature: Signature | None = None
        self._frames = Frames(handles)
        self._ledger = self._frames.ledger
        # The stream that is open now got our attaches, and still takes messages.
        self._present = False
        # Rows whose attach is unanswered on this stream; when there are none, steps may be sent.
        self._attaching: set[int] = set()
        self._leaving: Leaving | None = None

    # ------------------------------------------------------------ asked by the client

    def use(self, signature: Signature) -> None:
        """Sets the model's signature, before the first `submit`."""
        self._signature = signature

    @property
    def signature(self) -> Signature:
        """The model's, once `use` has set it."""
        if self._signature is None:
            raise RuntimeError("the population's model is not known yet")
        return self._signature

    @property
    def every_row(self) -> NDArray[np.intp]:
        """`[n]`, the indices of all rows."""
        return self._frames.every_row

    @property
    def row_errors(self) -> Mapping[int, ConveyorError]:
        """Rows whose sessions are gone -> why."""
        return self._frames.row_errors

    @property
    def acked(self) -> Seqs:
        """`[n]` uint64, the last step of each row that was answered."""
        return self._ledger.acked

    def blocker(self, rows: NDArray[np.intp]) -> Ticket[FrameStep] | None:
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
        if self._sending:
            for request in self._frames.requests(step):
                self._send_request(request)
        return step

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, every session once its steps are answered."""
        if self.error is None and self._leaving is None:
            self._leaving = how
            if self._sending:
                self._send_leave()
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
        self.opened.fail(error)
        self.left.fail(error)

    # ------------------------------------------------------------ Member: told by the stream

    @property
    def handles(self) -> range:
        return self._handles

    @property
    def busy(self) -> bool:
        return self.error is None and (bool(self._frames) or not self.opened.done or self._leaving is not None)

    @property
    def unanswered(self) -> bool:
        return bool(self._frames)

    @property
    def gone(self) -> bool:
        return self.error is not None

    def attach(self) -> None:
        self._present = True
        self._attaching = set(range(len(self._handles))) - self.row_errors.keys()
        for row in sorted(self._attaching):
            self._send_request(self.attachments[row].request())

    def attached(self, message: pb.SessionAttached) -> None:
        row = message.handle - self._handles.start
        attachment = self.attachments[row]
        error = attachment.accept(message)
        applied = message.session.applied_seq
        if error is None and self.opened.done:
            error = attachment.check_progress(applied, int(self.acked[row]), int(self._ledger.next_seqs[row]) - 1)
        if error is not None:
            self._send_goodbye(row, close=False)
            self._lose_row(row, error)
        else:
            self._ledger.granted(row, message.session.max_in_flight)
            if not self.opened.done:
                self._ledger.begin(row, applied)
        self._attach_answered(row)

    def result(self, message: pb.StepResult) -> None:
        self._frames.result(message)

    def owns(self, frame: Frame) -> bool:
        return self._frames.owns(frame)

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        self._frames.rows(frame, rows)

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:
        row = handle - self._handles.start
        if seq == 0:
            return self._refused(row, error)
        kind = verdict(error, held=not self._present)
        if kind is Verdict.ENDED:
            self._lose_row(row, error)
            return False
        held = int(self._ledger.resend_from[row])
        if kind is Verdict.RESEND:
            self._ledger.resend_from[row] = min(seq, held or seq)
            return True
        if kind is Verdict.ABORTED and held and seq > held:
            return False
        if kind is Verdict.APPLIED:
            self._ledger.skipped(row, seq)
        else:
            self._ledger.refused(row, min(seq, int(error.metadata.get("next_seq", seq))))
        self._frames.fail(row, seq, error)
        return False

    def detached(self, message: pb.SessionDetached) -> None:
        row = message.handle - self._handles.start
        if message.cause == pb.DETACH_CAUSE_DETACHED and self._leaving is None and not self._present:
            # The answer to our half-close: the next stream attaches again.
            return
        self._lose_row(row, self.attachments[row].lost(message.cause))

    def hold(self) -> None:
        self._present = False

    def suspend(self) -> None:
        self._present = False
        self._attaching.clear()
        self._frames.abort(lambda row, refused, seq: self.attachments[row].aborted(seq, refused))
        if self._leaving is Leaving.DETACH:
            # A lost stream is a detach.
            self._leave_done()

    def abandon(self, error: ConveyorError) -> None:
        if self.busy:
            self.end(error)

    # ------------------------------------------------------------ rules

    @property
    def _sending(self) -> bool:
        return self._present and not self._attaching

    def _refused(self, row: int, error: ConveyorError) -> bool:
        """An attach, detach or close of one row was refused."""
        if not self._present:
            # The stream takes no more, and what was not done is asked of the next one.
            return True
        if row in self._attaching and error.reason in PASSING and (self.opened.done or error.reason == "DRAINING"):
            return True
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
        for request in self._frames.unanswered():
            self._send_request(request)
        if self._leaving is not None:
            self._send_leave()

    def _lose_row(self, row: int, error: ConveyorError) -> None:
        """A row's session is gone: its steps fail, now and later."""
        if row in self.row_errors:
            return
        self._frames.fail_row(row, error)
        self._check_left()

    def _send_leave(self) -> None:
        for row in range(len(self._handles)):
            if row not in self.row_errors:
                self._send_goodbye(row, close=self._leaving is Leaving.CLOSE)

    def _send_goodbye(self, row: int, *, close: bool) -> None:
        self._send_request(self.attachments[row].goodbye(close=close))

    def _check_left(self) -> None:
        if self._leaving is not None and len(self.row_errors) == len(self._handles):
            self._leave_done()

    def _leave_done(self) -> None:
        self.left.resolve(None)
        what = "closed" if self._leaving is Leaving.CLOSE else "detached"
        self.end(ClientClosed(f"the population was {what} by this client"))
