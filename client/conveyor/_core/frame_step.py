"""One step of many rows, from its sending to its last row's answer.

Invariant: a row is pending until it is answered or refused, and is sent again as long as it is pending.
"""

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.batch import Batch, Piece, pick_rows
from conveyor._core.frame import Seqs
from conveyor._core.signature import Signature
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError

# A step of many rows travels in messages of about this size at most, so that its first rows run while its last ones
# travel, and no server's message limit is met by the number of sessions.
_MESSAGE_BYTES = 1 << 20


class FrameStep:
    """One step of some rows, until each of them is answered.

    Attributes:
        rows: `[k]`, the population's rows, each at most once.
        batch: their inputs.
        seqs: `[k]` uint64.
        pending: `[k]` bool, neither answered nor refused.
        pieces: the answers.
        errors: position in `rows` -> why it failed.
        ticket: settled with the step itself.
    """

    __slots__ = ("_positions", "_timeout_ms", "batch", "errors", "pending", "pieces", "rows", "seqs", "ticket")

    def __init__(self, rows: NDArray[np.intp], batch: Batch, seqs: Seqs, total: int, timeout_ms: int) -> None:
        self.rows = rows
        self.batch = batch
        self.seqs = seqs
        self.pending = np.ones(len(rows), np.bool_)
        self.pieces: list[Piece] = []
        self.errors: dict[int, ConveyorError] = {}
        self.ticket: Ticket[FrameStep] = Ticket()
        self._positions = np.full(total, -1, np.intp)
        self._positions[rows] = np.arange(len(rows))
        self._timeout_ms = timeout_ms

    def find(self, rows: NDArray[np.intp], seqs: Seqs) -> NDArray[np.intp]:
        """Positions of pending (row, seq) pairs; -1 for pairs that are not this step's."""
        positions = self._positions[rows]
        mine = (positions >= 0) & (self.seqs[positions] == seqs) & self.pending[positions]
        return np.where(mine, positions, -1)

    def requests(self, first_handle: int, signature: Signature, acked: Seqs) -> list[pb.StreamRequest]:
        """The messages that carry the pending rows."""
        positions = np.flatnonzero(self.pending)
        size = sum(column.nbytes for column in self.batch.columns)
        parts = min(len(positions), 1 + size // _MESSAGE_BYTES)
        return [self._request(part, first_handle, signature, acked) for part in np.array_split(positions, parts or 1)]

    def _request(
        self, positions: NDArray[np.intp], first_handle: int, signature: Signature, acked: Seqs
    ) -> pb.StreamRequest:
        columns, lengths = pick_rows(signature, self.batch, positions)
        frame = pb.StepFrame(
            handles=(self.rows[positions] + first_handle).astype("<u4").tobytes(),
            seqs=self.seqs[positions].astype("<u8").tobytes(),
            lengths=lengths,
            columns=columns,
            timeout_ms=self._timeout_ms,
            acked_seqs=acked[self.rows[positions]].astype("<u8").tobytes(),
        )
        return pb.StreamRequest(frame=frame)
