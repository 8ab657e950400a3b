"""Columnar answers: many rows in packed buffers. Decoded by numpy for whoever has many rows, cut up for who has few."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from conveyor_proto.codec import WireError, decode_integers
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor._core.answer import Answer
from conveyor.errors import ProtocolError

Handles = NDArray[np.uint32]
Seqs = NDArray[np.uint64]
Lengths = NDArray[np.uint32]


class Frame:
    """Answered rows. Those of one session are in the order of its steps.

    Attributes:
        handles: `[rows]` uint32.
        seqs: `[rows]` uint64.
        lengths: `[rows]` uint32, or None: one time step each.
        columns: per output, the rows' bytes one after the other.
    """

    __slots__ = ("_cuts", "_replayed", "columns", "handles", "lengths", "seqs")

    def __init__(
        self,
        handles: Handles,
        seqs: Seqs,
        lengths: Lengths | None,
        columns: Sequence[bytes],
        replayed: NDArray[np.uint32] | None = None,
    ) -> None:
        self.handles = handles
        self.seqs = seqs
        self.lengths = lengths
        self.columns = columns
        self._replayed = () if replayed is None else frozenset(replayed.tolist())
        self._cuts: _Cuts | None = None

    def answers(self, rows: Sequence[int], timed: Sequence[bool]) -> list[tuple[int, Answer]]:
        """Seq and answer of some rows, in their order.

        Args:
            rows: which, as indices.
            timed: for each of the model's outputs, whether it has time.

        Raises:
            ProtocolError: the columns are not those of such a model.
        """
        cuts = self._cuts
        if cuts is None or cuts.timed != timed:
            cuts = self._cuts = _Cuts(self, timed)
        seqs, replayed = cuts.seqs, self._replayed
        return [(seqs[row], Answer(cuts.row(row), row in replayed)) for row in rows]


class _Cuts:
    """Where a frame's rows begin and end."""

    __slots__ = ("_columns", "_starts", "seqs", "timed")

    def __init__(self, frame: Frame, timed: Sequence[bool]) -> None:
        if len(frame.columns) != len(timed):
            raise ProtocolError(f"{len(frame.columns)} outputs came in a frame and the model has {len(timed)}")
        self.timed = timed
        self.seqs: list[int] = frame.seqs.tolist()
        rows = len(self.seqs)
        self._starts: Sequence[int] = range(rows + 1)
        if frame.lengths is not None:
            self._starts = [0, *np.cumsum(frame.lengths, dtype=np.int64).tolist()]
        self._columns: list[tuple[memoryview, int, bool]] = []
        for column, has_time in zip(frame.columns, timed, strict=True):
            parts = self._starts[-1] if has_time else rows
            size, rest = divmod(len(column), parts or 1)
            if rest:
                raise ProtocolError(f"a column of {len(column)} bytes came in a frame for {parts} rows or time steps")
            self._columns.append((memoryview(column), size, has_time))

    def row(self, row: int) -> list[memoryview]:
        """One row's bytes, per output."""
        first, last = self._starts[row], self._starts[row + 1]
        return [
            column[first * size : last * size] if has_time else column[row * size : (row + 1) * size]
            for column, size, has_time in self._columns
        ]


def decode_frame(message: pb.ResultFrame) -> Frame:
    """The rows of a frame.

    Raises:
        ProtocolError: the frame's vectors disagree.
    """
    try:
        handles = cast("Handles", decode_integers(message.handles, np.uint32, -1, "handles"))
        rows = len(handles)
        seqs = cast("Seqs", decode_integers(message.seqs, np.uint64, rows, "seqs"))
        lengths = replayed = None
        if message.lengths:
            lengths = cast("Lengths", decode_integers(message.lengths, np.uint32, rows, "lengths"))
        if message.replayed_rows:
            replayed = cast("Lengths", decode_integers(message.replayed_rows, np.uint32, -1, "replayed_rows"))
    except WireError as error:
        raise ProtocolError(f"a result frame cannot be read: {error}") from error
    # Each look at a repeated field of bytes copies: one look per column.
    return Frame(handles, seqs, lengths, list(message.columns), replayed)
