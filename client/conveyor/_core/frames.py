"""A population's steps on their way: numbered, matched with their answers, and failed row by row where rows fail.

Invariant: every row of a step is settled once, by its answer or by an error; the step's ticket follows its last row.
What a new server lacks of the answered steps is sent again first, and as many at once as its credit allows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.batch import Batch, Piece
from conveyor._core.frame import Frame, Seqs
from conveyor._core.frame_step import FrameStep
from conveyor._core.kept_frames import KeptFrames
from conveyor._core.ledger import ALL, Ledger, Picked
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError

_NUMBER = attrgetter("number")


class Frames:
    """The unanswered steps of one population.

    Attributes:
        ledger: the rows' numbers.
        every_row: `[n]`, the indices of all rows.
        row_errors: rows whose sessions are gone -> why.
        kept: the frames that may have to be sent again.
    """

    def __init__(self, handles: range, resend_buffer_bytes: int) -> None:
        self.ledger = Ledger(len(handles))
        self.kept = KeptFrames(self.ledger, resend_buffer_bytes)
        self.every_row = np.arange(len(handles))
        self.row_errors: dict[int, ConveyorError] = {}
        self._handles = handles
        self._handle_bytes = np.arange(handles.start, handles.stop, dtype=np.uint32).tobytes()
        # In the order in which they were submitted.
        self._steps: list[FrameStep] = []
        self._submitted = 0
        # Those that this stream was not given.
        self._unsent: deque[FrameStep] = deque()
        # How many it was given and has not answered.
        self._on_stream = 0
        # How many are sent again.
        self._again = 0
        # Where the servers had the rows when that began; what was answered since is not acknowledged until it is over.
        self._resumed_at: Seqs = np.zeros(len(handles), np.uint64)
        # Rows that were refused for now -> with what, once for each of their steps that the server has refused since.
        self._told: dict[int, list[ConveyorError]] = {}

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def again(self) -> bool:
        """Some steps that were answered before are sent again."""
        return self._again > 0

    @property
    def unsent(self) -> bool:
        """Some step was not given to this stream."""
        return bool(self._unsent)

    @property
    def full(self) -> bool:
        """The store lacks so much that nothing more may be submitted."""
        return self.ledger.keeps and self.kept.buffer.full

    def blocker(self, rows: NDArray[np.intp]) -> Ticket[Any] | None:
        """What to wait for before `submit` may be called for these rows; None: nothing."""
        if self._steps and not self.ledger.may_submit(self._picked(rows)):
            return self._steps[0].ticket
        if self.full:
            return self.kept.buffer.room()
        return None

    def submit(self, rows: NDArray[np.intp], batch: Batch, timeout_ms: int) -> FrameStep:
        """Numbers a step of some rows; those whose sessions are gone fail at once."""
        picked, handles = self._picked(rows), self._handle_bytes
        if picked is not ALL:
            handles = (rows + self._handles.start).astype("<u4").tobytes()
        seqs, self._submitted = self.ledger.submit(picked), self._submitted + 1
        step = FrameStep(rows, picked, batch, seqs, handles, number=self._submitted, timeout_ms=timeout_ms)
        self._steps.append(step)
        self._unsent.append(step)
        if self.ledger.keeps:
            self.kept.submitted(step)
        if self.row_errors:
            for position in np.flatnonzero(np.isin(rows, list(self.row_errors))).tolist():
                row = int(rows[position])
                self.ledger.unsubmit(row)
                self._fail(step, position, self.row_errors[row], applied=False)
        return step

    # ------------------------------------------------------------ sending

    def take(self) -> Iterator[pb.StreamRequest]:
        """The messages that may be sent now, and count as sent from here on."""
        while self._unsent and (not self._again or self._on_stream < int(self.ledger.credits.min())):
            step = self._unsent.popleft()
            if step.left:
                step.sent = True
                self._on_stream += 1
                yield from step.requests(self._acked)

    def begin(self, applied: Seqs) -> None:
        """A stream takes steps from here on. Its server has the rows at `applied` `[n]`, and lacks all that follows."""
        steps = [step for step in self._steps if not step.again]
        self.kept.release()
        again = list(self.kept.after(applied))
        for step in steps:
            step.sent = False
            answered = step.applied()
            repeated = step.repeat(answered[step.seqs[answered] > applied[step.rows[answered]]])
            if repeated is not None:
                again.append(repeated)
        # A row's steps are done in their order, and frames are not.
        self._steps = sorted(again + steps, key=_NUMBER) if again else steps
        self._again = len(again)
        self._unsent = deque(self._steps)
        self._on_stream = 0
        self._resumed_at = applied

    @property
    def _acked(self) -> Seqs:
        return np.minimum(self.ledger.acked, self._resumed_at) if self._again else self.ledger.acked

    # ------------------------------------------------------------ refused for now

    def postpone(self, row: int, seq: int, error: ConveyorError | None) -> None:
        """A row's step was refused for now: it is sent again, and what was sent behind it; None: on the next stream."""
        held = int(self.ledger.resend_from[row])
        self.ledger.resend_from[row] = min(seq, held or seq)
        if error is not None:
            self._told.setdefault(row, []).append(error)

    def followed(self, row: int, error: ConveyorError) -> None:
        """A row's later step was refused because of that, with an error that says no more."""
        if row in self._told:
            self._told[row].append(error)

    def told(self, row: int) -> bool:
        """A row was refused for now, and the server has spoken about all its steps that the stream was given."""
        given = sum(step.sent and step.position(row) is not None for step in self._steps)
        return len(self._told.get(row, ())) >= max(1, given)

    @property
    def setbacks(self) -> Mapping[int, Sequence[ConveyorError]]:
        """Rows that were refused for now -> why, first."""
        return self._told

    def first(self, row: int) -> int | None:
        """The row's first step that is unanswered on this stream."""
        for step in self._steps:
            position = step.position(row)
            if position is not None:
                return int(step.seqs[position])
        return None

    def retry(self, rows: Sequence[int]) -> Iterator[pb.StreamRequest]:
        """The messages that carry again what some rows were refused; only those that were `told`."""
        for row in rows:
            self.ledger.resend_from[row] = 0
            self._told.pop(row, None)
        for step in self._steps:
            if step.sent:
                yield from step.requests(self._acked, rows)

    # ------------------------------------------------------------ answers

    def owns(self, frame: Frame) -> bool:
        """Every row of the frame is of this population."""
        if frame.handle_bytes == self._handle_bytes:
            return True
        return int(frame.handles.min()) in self._handles and int(frame.handles.max()) in self._handles

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        """Rows of a frame are answers: these, or all of them."""
        if rows is None and self._steps and self._steps[0].answered_by(frame):
            step = self._steps[0]
            self._answered(step, ALL, frame, ALL)
            if frame.durables is not None and self.ledger.stores:
                self.stored(step.picked, frame.durables)
            return
        mine = np.arange(frame.rows) if rows is None else np.array(rows)
        its_rows = frame.handles[mine].astype(np.intp) - self._handles.start
        seqs = frame.seqs[mine]
        self._match(its_rows, seqs, frame, mine)
        if frame.durables is not None and self.ledger.stores:
            self.stored(its_rows, frame.durables[mine])

    def _match(self, its_rows: NDArray[np.intp], seqs: Seqs, frame: Frame, mine: NDArray[np.intp]) -> None:
        for step in list(self._steps):
            positions = step.find(its_rows, seqs)
            found = positions >= 0
            if not found.any():
                continue
            self._answered(step, positions[found], frame, mine[found])
            if found.all():
                return
            mine, its_rows, seqs = mine[~found], its_rows[~found], seqs[~found]

    def stored(self, rows: Picked, seqs: Seqs) -> None:
        """The store has the rows' steps up to these."""
        self.ledger.moved(rows, seqs)
        if self.kept:
            self.kept.release()

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
        if message.HasField("durable_seq") and self.ledger.stores:
            self.stored(np.array([message.handle - self._handles.start]), np.array([message.durable_seq], np.uint64))

    def _answered(self, step: FrameStep, positions: Picked, frame: Frame, picked: Picked) -> None:
        """Rows of a frame answer pending rows of a step, which are all of them where `positions` is ALL."""
        step.settle(positions)
        if not step.again:
            step.pieces.append(Piece(positions, picked, frame.lengths, frame.columns))
            rows = step.picked if positions is ALL else step.rows[positions]
            self.ledger.answered(rows, step.seqs[positions])
        self._check_done(step)

    # ------------------------------------------------------------ failures

    def is_again(self, row: int, seq: int) -> bool:
        """The row's step was answered before, and is unanswered on this stream."""
        found = self._find(row, seq) if self._again else None
        return found is not None and found[0].again

    def fail(self, row: int, seq: int, error: ConveyorError, *, applied: bool) -> None:
        """One row's step was not applied, or it was and its answer is lost."""
        found = self._find(row, seq)
        if found is not None:
            self._fail(*found, error, applied=applied)

    def fail_row(self, row: int, error: ConveyorError) -> None:
        """A row's session is gone: its steps fail, now and later."""
        self.row_errors[row] = error
        self._told.pop(row, None)
        self._fail_from(row, 0, lambda _: error)
        self.ledger.lost(row)
        self.kept.release()

    def abort(self, aborted: Callable[[int, int, int], ConveyorError]) -> None:
        """The stream is gone: what followed a refused step is refused with it; the rest is sent again.

        Args:
            aborted: the error for (row, the seq that was refused, seq).
        """
        self.ledger.resend_from[:] = 0
        self._told.clear()
        self.abort_rows(np.flatnonzero(self.ledger.blocked).tolist(), aborted)

    def abort_rows(self, rows: Iterable[int], aborted: Callable[[int, int, int], ConveyorError]) -> None:
        """What followed a refused step of these rows, if any was refused, is refused with it."""
        for row in rows:
            if self.ledger.blocked[row]:
                refused = int(self.ledger.next_seqs[row])
                self._fail_from(row, refused, partial(aborted, row, refused))

    def end(self, error: ConveyorError) -> None:
        """Every step fails as a whole."""
        steps, self._steps = self._steps, []
        self._unsent.clear()
        self._again = 0
        self.kept.clear()
        for step in steps:
            step.ticket.fail(error)

    def _fail_from(self, row: int, first_seq: int, error: Callable[[int], ConveyorError]) -> None:
        for step in list(self._steps):
            position = step.position(row)
            if position is not None and (seq := int(step.seqs[position])) >= first_seq:
                self._fail(step, position, error(seq), applied=False)

    def _fail(self, step: FrameStep, position: int, error: ConveyorError, *, applied: bool) -> None:
        step.settle(np.array([position]))
        if not step.again:
            step.errors[position] = error
            if not applied:
                step.unapplied(position)
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
            self._on_stream -= step.sent
            if step.again:
                self._again -= 1
            else:
                self.kept.done(step)
            step.ticket.resolve(step)

    def _picked(self, rows: NDArray[np.intp]) -> Picked:
        return ALL if rows is self.every_row or np.array_equal(rows, self.every_row) else rows
