"""Many sessions on a stream, stepped together in frames. The rules are a session's, held in arrays: one entry per row.

Invariant: as in `session`, per row. A frame's ticket settles when each of its rows was answered or refused; a row that
fails stops no other.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.attachment import Attachment, Claim
from conveyor._core.batch import Batch, Piece
from conveyor._core.frame import Frame, Seqs
from conveyor._core.frame_step import FrameStep
from conveyor._core.ledger import ALL, Ledger, Picked
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
        every_row: `[n]`, the indices of all rows.
        error: why nothing can be asked of it any more, or None.
        row_errors: rows whose sessions are gone -> why.
    """

    def __init__(self, handles: range, claims: Sequence[Claim], send: Send) -> None:
        self.attachments = [Attachment(handle, claim) for handle, claim in zip(handles, claims, strict=True)]
        self.opened: Ticket[pb.SessionInfo] = Ticket()
        self.left: Ticket[None] = Ticket()
        self.error: ConveyorError | None = None
        self.row_errors: dict[int, ConveyorError] = {}
        self._handles = handles
        self._send_request = send
        self._signature: Signature | None = None
        self.every_row = np.arange(len(handles))
        self._handle_bytes = np.arange(handles.start, handles.stop, dtype=np.uint32).tobytes()
        self._ledger = Ledger(len(handles))
        # The stream that is open now got our attaches, and still takes messages.
        self._present = False
        # Rows whose attach is unanswered on this stream; when there are none, steps may be sent.
        self._attaching: set[int] = set()
        self._leaving: Leaving | None = None
        # In the order in which they were submitted.
        self._frames: list[FrameStep] = []

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
        if self._frames and not self._ledger.may_submit(self._picked(rows)):
            return self._frames[0].ticket
        return None

    def submit(self, rows: NDArray[np.intp], batch: Batch, timeout_ms: int = 0) -> FrameStep:
        """Numbers a step of some rows and sends it now, or with the next stream. Only where `blocker` gave None."""
        picked, handles = self._picked(rows), self._handle_bytes
        if picked is not ALL:
            handles = (rows + self._handles.start).astype("<u4").tobytes()
        step = FrameStep(rows, picked, batch, self._ledger.submit(picked), handles, timeout_ms=timeout_ms)
        self._frames.append(step)
        if self.row_errors:
            for position in np.flatnonzero(np.isin(rows, list(self.row_errors))).tolist():
                row = int(rows[position])
                self._ledger.unsubmit(row)
                self._fail_position(step, position, self.row_errors[row])
        if self._sending:
            self._send_step(step)
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
        frames, self._frames = self._frames, []
        for step in frames:
            step.ticket.fail(error)
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
        row, seq = message.handle - self._handles.start, np.array([message.seq], np.uint64)
        for step in self._frames:
            (position,) = step.find(np.array([row]), seq)
            if position >= 0:
                lengths = step.batch.lengths
                frame = Frame(
                    np.uint32(message.handle).tobytes(),
                    seq.tobytes(),
                    [tensor.data for tensor in message.outputs],
                    None if lengths is None else lengths[[position]],
                )
                self._answered(step, np.array([position]), frame, ALL)
                return

    def owns(self, frame: Frame) -> bool:
        if frame.handle_bytes == self._handle_bytes:
            return True
        return int(frame.handles.min()) in self._handles and int(frame.handles.max()) in self._handles

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        if rows is None and self._frames and self._frames[0].answered_by(frame):
            self._answered(self._frames[0], ALL, frame, ALL)
            return
        mine = np.arange(frame.rows) if rows is None else np.array(rows)
        its_rows = frame.handles[mine].astype(np.intp) - self._handles.start
        seqs = frame.seqs[mine]
        for step in list(self._frames):
            positions = step.find(its_rows, seqs)
            found = positions >= 0
            if not found.any():
                continue
            self._answered(step, positions[found], frame, mine[found])
            if found.all():
                return
            mine, its_rows, seqs = mine[~found], its_rows[~found], seqs[~found]

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
        self._fail_step(row, seq, error)
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
        self._ledger.resend_from[:] = 0
        for row in np.flatnonzero(self._ledger.blocked).tolist():
            next_seq = int(self._ledger.next_seqs[row])
            for step in list(self._frames):
                for position in np.flatnonzero((step.rows == row) & step.pending & (step.seqs >= next_seq)).tolist():
                    seq = int(step.seqs[position])
                    self._fail_step(row, seq, self.attachments[row].aborted(seq, next_seq))
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
        for step in self._frames:
            self._send_step(step)
        if self._leaving is not None:
            self._send_leave()

    def _lose_row(self, row: int, error: ConveyorError) -> None:
        """A row's session is gone: its steps fail, now and later."""
        if row in self.row_errors:
            return
        self.row_errors[row] = error
        for step in list(self._frames):
            for position in np.flatnonzero((step.rows == row) & step.pending).tolist():
                self._fail_step(row, int(step.seqs[position]), error)
        self._check_left()

    def _fail_step(self, row: int, seq: int, error: ConveyorError) -> None:
        for step in list(self._frames):
            position = int(step.find(np.array([row]), np.array([seq], np.uint64))[0])
            if position >= 0:
                self._fail_position(step, position, error)
                return

    def _fail_position(self, step: FrameStep, position: int, error: ConveyorError) -> None:
        step.errors[position] = error
        step.settle(np.array([position]))
        self._ledger.settled(step.rows[[position]])
        self._check_done(step)

    def _answered(self, step: FrameStep, positions: Picked, frame: Frame, picked: Picked) -> None:
        """Rows of a frame answer pending rows of a step, which are all of them where `positions` is ALL."""
        step.pieces.append(Piece(positions, picked, frame.lengths, frame.columns))
        step.settle(positions)
        rows = step.picked if positions is ALL else step.rows[positions]
        self._ledger.answered(rows, step.seqs[positions])
        self._check_done(step)

    def _check_done(self, step: FrameStep) -> None:
        if not step.left:
            self._frames.remove(step)
            step.ticket.resolve(step)

    def _picked(self, rows: NDArray[np.intp]) -> Picked:
        return ALL if rows is self.every_row or np.array_equal(rows, self.every_row) else rows

    def _send_step(self, step: FrameStep) -> None:
        if step.left:
            for request in step.requests(self.acked):
                self._send_request(request)

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
