"""One step of many rows, from its sending to its last row's answer.

Invariant: a row is pending until it is answered or refused, and is sent again as long as it is pending.
"""

from collections.abc import Iterable

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.batch import Batch, Piece, pick_rows, take_rows
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
        again: its rows were answered before, by a server that is gone; these answers are nobody's.
        sent: the stream that is open now was given it.
        number: where it is in the order of submission.
    """

    __slots__ = (
        "_handles",
        "_order",
        "_pending",
        "_positions",
        "_seqs",
        "_timeout_ms",
        "_unapplied",
        "again",
        "batch",
        "errors",
        "left",
        "number",
        "picked",
        "pieces",
        "rows",
        "sent",
        "seqs",
        "ticket",
    )

    def __init__(
        self,
        rows: NDArray[np.intp],
        picked: Picked,
        batch: Batch,
        seqs: Seqs,
        handles: bytes,
        *,
        number: int = 0,
        timeout_ms: int = 0,
        again: bool = False,
    ) -> None:
        self.rows = rows
        self.picked = picked
        self.batch = batch
        self.seqs = seqs
        self.left = len(rows)
        self.pieces: list[Piece] = []
        self.errors: dict[int, ConveyorError] = {}
        self.ticket: Ticket[FrameStep] = Ticket()
        self.number = number
        self.again = again
        self.sent = False
        # As they travel.
        self._handles = handles
        self._seqs = seqs.tobytes()
        self._timeout_ms = timeout_ms
        # Made when the step is settled in parts, which few are.
        self._pending: NDArray[np.bool_] | None = None
        self._order: NDArray[np.intp] | None = None
        self._positions: dict[int, int] | None = None
        # Positions that were refused, and not applied.
        self._unapplied: list[int] = []

    @property
    def size_bytes(self) -> int:
        """Of the inputs."""
        return sum(map(len, self.batch.columns))

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

    def unapplied(self, position: int) -> None:
        """A row's step was refused: it has no part in the row's state."""
        self._unapplied.append(position)

    def applied(self) -> NDArray[np.intp]:
        """Positions that were answered, or whose answer is lost."""
        applied = ~self.pending
        applied[self._unapplied] = False
        return np.flatnonzero(applied)

    def repeat(self, positions: NDArray[np.intp]) -> "FrameStep | None":
        """The same step of some of its rows, which were answered before, to be sent again; None: of no row."""
        if not len(positions):
            return None
        if len(positions) == len(self.rows):
            return FrameStep(
                self.rows, self.picked, self.batch, self.seqs, self._handles, number=self.number, again=True
            )
        handles = np.frombuffer(self._handles, np.uint32)[positions].tobytes()
        rows, batch = self.rows[positions], take_rows(self.batch, positions)
        return FrameStep(rows, rows, batch, self.seqs[positions], handles, number=self.number, again=True)

    def requests(self, acked: Seqs, only: Iterable[int] | None = None) -> list[pb.StreamRequest]:
        """The messages that carry the pending rows.

        Args:
            acked: of all of the population's rows.
            only: rows of the population; None: all.
        """
        acked = acked[self.picked]
        size = self.size_bytes
        if self.left == len(self.rows) and size <= MESSAGE_BYTES and only is None:
            return [self._request(self._handles, self._seqs, acked.tobytes(), ALL)]
        wanted = self.pending if only is None else self.pending & np.isin(self.rows, list(only))
        positions = np.flatnonzero(wanted)
        if not len(positions):
            return []
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
