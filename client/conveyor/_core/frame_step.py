"""One step of many rows, from its sending to its last row's answer.

Invariant: a row is pending until it is answered or refused, and is sent again as long as it is pending.
"""

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.batch import Batch, Piece, pick_rows
from conveyor._core.frame import Frame, Seqs
from conveyor._core.gather import MESSAGE_BYTES
from conveyor._core.ledger import ALL, Picked
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError


class FrameStep:
    """One step of some rows, until each of them is answered.

    Attributes:
        rows: `[k]`, the population's rows, each at most once.
        picked: the same for indexing.
        batch: their inputs.
        seqs: `[k]` uint64.
        pending: `[k]` bool, neither answered nor refused.
        left: how many are pending.
        pieces: the answers.
        errors: position in `rows` -> why it failed.
        ticket: settled with the step itself.
    """

    __slots__ = (
        "_handles",
        "_positions",
        "_timeout_ms",
        "_total",
        "batch",
        "errors",
        "left",
        "pending",
        "picked",
        "pieces",
        "rows",
        "seqs",
        "ticket",
    )

    def __init__(
        self,
        rows: NDArray[np.intp],
        picked: Picked,
        batch: Batch,
        seqs: Seqs,
        handles: NDArray[np.uint32],
        *,
        timeout_ms: int,
    ) -> None:
        self.rows = rows
        self.picked = picked
        self.batch = batch
        self.seqs = seqs
        self.left = len(rows)
        self.pending = np.ones(self.left, np.bool_)
        self.pieces: list[Piece] = []
        self.errors: dict[int, ConveyorError] = {}
        self.ticket: Ticket[FrameStep] = Ticket()
        self._total = len(handles)
        self._handles = handles[picked]
        self._positions: NDArray[np.intp] | None = None
        self._timeout_ms = timeout_ms

    def answered_by(self, frame: Frame) -> bool:
        """A frame has the answers of all rows and of no other, in their order."""
        return (
            self.left == len(self.rows)
            and len(frame.handles) == self.left
            and np.array_equal(frame.seqs, self.seqs)
            and np.array_equal(frame.handles, self._handles)
        )

    def find(self, rows: NDArray[np.intp], seqs: Seqs) -> NDArray[np.intp]:
        """Positions of pending (row, seq) pairs; -1 for pairs that are not this step's."""
        if self._positions is None:
            self._positions = np.full(self._total, -1, np.intp)
            self._positions[self.rows] = np.arange(len(self.rows))
        positions = self._positions[rows]
        mine = (positions >= 0) & (self.seqs[positions] == seqs) & self.pending[positions]
        return np.where(mine, positions, -1)

    def settle(self, positions: Picked) -> None:
        """Rows that were pending are answered or refused."""
        self.pending[positions] = False
        self.left = 0 if positions is ALL else int(np.count_nonzero(self.pending))

    def requests(self, acked: Seqs) -> list[pb.StreamRequest]:
        """The messages that carry the pending rows; `acked` is of all of the population's rows."""
        acked = acked[self.picked]
        size = sum(column.nbytes for column in self.batch.columns)
        if self.left == len(self.rows) and size <= MESSAGE_BYTES:
            return [self._request(ALL, acked)]
        positions = np.flatnonzero(self.pending)
        parts = min(len(positions), 1 + size // MESSAGE_BYTES)
        return [self._request(part, acked) for part in np.array_split(positions, parts or 1)]

    def _request(self, positions: Picked, acked: Seqs) -> pb.StreamRequest:
        # Built in place: a message that is assigned to another is copied by way of its bytes.
        request = pb.StreamRequest()
        message = request.frame
        message.handles = self._handles[positions].tobytes()
        message.seqs = self.seqs[positions].tobytes()
        columns, message.lengths = pick_rows(self.batch, positions)
        message.columns.extend(columns)
        message.timeout_ms = self._timeout_ms
        message.acked_seqs = acked[positions].tobytes()
        return request
