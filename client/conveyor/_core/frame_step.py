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
        left: how many rows are pending: neither answered nor refused.
        pieces: the answers.
        errors: position in `rows` -> why it failed.
        ticket: settled with the step itself.
    """

    __slots__ = (
        "_handles",
        "_order",
        "_pending",
        "_positions",
        "_seqs",
        "_timeout_ms",
        "batch",
        "errors",
        "left",
        "picked",
        "pieces",
        "rows",
        "seqs",
        "ticket",
    )

    def __init__(
        self, rows: NDArray[np.intp], picked: Picked, batch: Batch, seqs: Seqs, handles: bytes, *, timeout_ms: int = 0
    ) -> None:
        self.rows = rows
        self.picked = picked
        self.batch = batch
        self.seqs = seqs
        self.left = len(rows)
        self.pieces: list[Piece] = []
        self.errors: dict[int, ConveyorError] = {}
        self.ticket: Ticket[FrameStep] = Ticket()
        # As they travel.
        self._handles = handles
        self._seqs = seqs.tobytes()
        self._timeout_ms = timeout_ms
        # Made when the step is settled in parts, which few are.
        self._pending: NDArray[np.bool_] | None = None
        self._order: NDArray[np.intp] | None = None
        self._positions: dict[int, int] | None = None

    @property
    def pending(self) -> NDArray[np.bool_]:
        """`[k]`, the rows that are neither answered nor refused."""
        if self._pending is None:
            self._pending = np.full(len(self.rows), bool(self.left), np.bool_)
        return self._pending

    def answered_by(self, frame: Frame) -> bool:
        """A frame has the answers of all rows and of no other, in their order."""
        return self.left == frame.rows and frame.seq_bytes == self._seqs and frame.handle_bytes == self._handles

    def position(self, row: int) -> int | None:
        """Where a row is, while it is pending."""
        if self._positions is None:
            self._positions = {each: position for position, each in enumerate(self.rows.tolist())}
        position = self._positions.get(row)
        return position if position is not None and self.pending[position] else None

    def find(self, rows: NDArray[np.intp], seqs: Seqs) -> NDArray[np.intp]:
        """Positions of pending (row, seq) pairs; -1 for pairs that are not this step's."""
        if self._order is None:
            self._order = np.argsort(self.rows)
        at = np.searchsorted(self.rows, rows, sorter=self._order)
        positions = self._order[np.minimum(at, len(self._order) - 1)]
        mine = (self.rows[positions] == rows) & (self.seqs[positions] == seqs) & self.pending[positions]
        return np.where(mine, positions, -1)

    def settle(self, positions: Picked) -> None:
        """Rows that were pending are answered or refused."""
        if isinstance(positions, slice):
            self.left, self._pending = 0, None
        else:
            self.pending[positions] = False
            self.left -= len(positions)

    def requests(self, acked: Seqs) -> list[pb.StreamRequest]:
        """The messages that carry the pending rows; `acked` is of all of the population's rows."""
        acked = acked[self.picked]
        size = sum(map(len, self.batch.columns))
        if self.left == len(self.rows) and size <= MESSAGE_BYTES:
            return [self._request(self._handles, self._seqs, acked.tobytes(), ALL)]
        positions = np.flatnonzero(self.pending)
        handles = np.frombuffer(self._handles, np.uint32)
        parts = min(len(positions), 1 + size // MESSAGE_BYTES)
        return [
            self._request(handles[part].tobytes(), self.seqs[part].tobytes(), acked[part].tobytes(), part)
            for part in np.array_split(positions, parts or 1)
        ]

    def _request(self, handles: bytes, seqs: bytes, acked: bytes, positions: Picked) -> pb.StreamRequest:
        # Built in place: a message that is assigned to another is copied by way of its bytes.
        request = pb.StreamRequest()
        message = request.frame
        message.handles = handles
        message.seqs = seqs
        columns, message.lengths = pick_rows(self.batch, positions)
        message.columns.extend(columns)
        message.timeout_ms = self._timeout_ms
        message.acked_seqs = acked
        return request
