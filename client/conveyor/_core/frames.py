"""A population's steps on their way: numbered, matched with their answers, and failed row by row where rows fail.

Invariant: every row of a step is settled once, by its answer or by an error; the step's ticket follows its last row.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.batch import Batch, Piece
from conveyor._core.frame import Frame
from conveyor._core.frame_step import FrameStep
from conveyor._core.ledger import ALL, Ledger, Picked
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError


class Frames:
    """The unanswered steps of one population.

    Attributes:
        ledger: the rows' numbers.
        every_row: `[n]`, the indices of all rows.
        row_errors: rows whose sessions are gone -> why.
    """

    def __init__(self, handles: range) -> None:
        self.ledger = Ledger(len(handles))
        self.every_row = np.arange(len(handles))
        self.row_errors: dict[int, ConveyorError] = {}
        self._handles = handles
        self._handle_bytes = np.arange(handles.start, handles.stop, dtype=np.uint32).tobytes()
        # In the order in which they were submitted.
        self._steps: list[FrameStep] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def blocker(self, rows: NDArray[np.intp]) -> Ticket[FrameStep] | None:
        """What to wait for before `submit` may be called for these rows; None: nothing."""
        if self._steps and not self.ledger.may_submit(self._picked(rows)):
            return self._steps[0].ticket
        return None

    def submit(self, rows: NDArray[np.intp], batch: Batch, timeout_ms: int) -> FrameStep:
        """Numbers a step of some rows; those whose sessions are gone fail at once."""
        picked, handles = self._picked(rows), self._handle_bytes
        if picked is not ALL:
            handles = (rows + self._handles.start).astype("<u4").tobytes()
        step = FrameStep(rows, picked, batch, self.ledger.submit(picked), handles, timeout_ms=timeout_ms)
        self._steps.append(step)
        if self.row_errors:
            for position in np.flatnonzero(np.isin(rows, list(self.row_errors))).tolist():
                row = int(rows[position])
                self.ledger.unsubmit(row)
                self._fail(step, position, self.row_errors[row])
        return step

    def requests(self, step: FrameStep) -> list[pb.StreamRequest]:
        """The messages that carry what is pending of a step."""
        return step.requests(self.ledger.acked) if step.left else []

    def unanswered(self) -> Iterable[pb.StreamRequest]:
        """The messages that carry all that is pending."""
        for step in list(self._steps):
            yield from self.requests(step)

    # ------------------------------------------------------------ answers

    def owns(self, frame: Frame) -> bool:
        """Every row of the frame is of this population."""
        if frame.handle_bytes == self._handle_bytes:
            return True
        return int(frame.handles.min()) in self._handles and int(frame.handles.max()) in self._handles

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        """Rows of a frame are answers: these, or all of them."""
        if rows is None and self._steps and self._steps[0].answered_by(frame):
            self._answered(self._steps[0], ALL, frame, ALL)
            return
        mine = np.arange(frame.rows) if rows is None else np.array(rows)
        its_rows = frame.handles[mine].astype(np.intp) - self._handles.start
        seqs = frame.seqs[mine]
        for step in list(self._steps):
            positions = step.find(its_rows, seqs)
            found = positions >= 0
            if not found.any():
                continue
            self._answered(step, positions[found], frame, mine[found])
            if found.all():
                return
            mine, its_rows, seqs = mine[~found], its_rows[~found], seqs[~found]

    def result(self, message: pb.StepResult) -> None:
        """A row was answered alone: a frame of one row."""
        found = self._find(message.handle - self._handles.start, message.seq)
        if found is not None:
            step, position = found
            lengths = step.batch.lengths
            frame = Frame(
                np.uint32(message.handle).tobytes(),
                np.uint64(message.seq).tobytes(),
                [tensor.data for tensor in message.outputs],
                None if lengths is None else lengths[[position]],
            )
            self._answered(step, np.array([position]), frame, ALL)

    def _answered(self, step: FrameStep, positions: Picked, frame: Frame, picked: Picked) -> None:
        """Rows of a frame answer pending rows of a step, which are all of them where `positions` is ALL."""
        step.pieces.append(Piece(positions, picked, frame.lengths, frame.columns))
        step.settle(positions)
        rows = step.picked if positions is ALL else step.rows[positions]
        self.ledger.answered(rows, step.seqs[positions])
        self._check_done(step)

    # ------------------------------------------------------------ failures

    def fail(self, row: int, seq: int, error: ConveyorError) -> None:
        """One row's step was not applied, or its answer is lost."""
        found = self._find(row, seq)
        if found is not None:
            self._fail(*found, error)

    def fail_row(self, row: int, error: ConveyorError) -> None:
        """A row's session is gone: its steps fail, now and later."""
        self.row_errors[row] = error
        self._fail_from(row, 0, lambda _: error)

    def abort(self, aborted: Callable[[int, int, int], ConveyorError]) -> None:
        """The stream is gone: what followed a refused step is refused with it; the rest is sent again.

        Args:
            aborted: the error for (row, the seq that was refused, seq).
        """
        self.ledger.resend_from[:] = 0
        for row in np.flatnonzero(self.ledger.blocked).tolist():
            refused = int(self.ledger.next_seqs[row])
            self._fail_from(row, refused, partial(aborted, row, refused))

    def end(self, error: ConveyorError) -> None:
        """Every step fails as a whole."""
        steps, self._steps = self._steps, []
        for step in steps:
            step.ticket.fail(error)

    def _fail_from(self, row: int, first_seq: int, error: Callable[[int], ConveyorError]) -> None:
        for step in list(self._steps):
            position = step.position(row)
            if position is not None and (seq := int(step.seqs[position])) >= first_seq:
                self._fail(step, position, error(seq))

    def _fail(self, step: FrameStep, position: int, error: ConveyorError) -> None:
        step.errors[position] = error
        step.settle(np.array([position]))
        self.ledger.settled(step.rows[[position]])
        self._check_done(step)

    # ------------------------------------------------------------ helpers

    def _find(self, row: int, seq: int) -> tuple[FrameStep, int] | None:
        for step in self._steps:
            position = step.position(row)
            if position is not None and step.seqs[position] == seq:
                return step, position
        return None

    def _check_done(self, step: FrameStep) -> None:
        if not step.left:
            self._steps.remove(step)
            step.ticket.resolve(step)

    def _picked(self, rows: NDArray[np.intp]) -> Picked:
        return ALL if rows is self.every_row or np.array_equal(rows, self.every_row) else rows
