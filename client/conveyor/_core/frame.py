"""Columnar answers: many rows in packed buffers. Decoded by numpy for whoever has many rows, cut up for who has few."""

from collections.abc import Sequence

import numpy as np
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
        rows: how many.
        handle_bytes, seq_bytes: `handles` and `seqs` as they came.
        lengths: `[rows]` uint32, or None: one time step each.
        columns: per output, the rows' bytes one after the other.
        durables: `[rows]` uint64, the last step of each row's session that is in the server's store, or None.
    """

    __slots__ = (
        "_cuts",
        "_handles",
        "_replayed",
        "_seqs",
        "columns",
        "durables",
        "handle_bytes",
        "lengths",
        "rows",
        "seq_bytes",
    )

    def __init__(
        self,
        handle_bytes: bytes,
        seq_bytes: bytes,
        columns: Sequence[bytes],
        lengths: Lengths | None = None,
        replayed_bytes: bytes = b"",
        *,
        durables: Seqs | None = None,
    ) -> None:
        self.rows = len(handle_bytes) // 4
        self.handle_bytes = handle_bytes
        self.seq_bytes = seq_bytes
        self.lengths = lengths
        self.columns = columns
        self.durables = durables
        self._replayed = frozenset(np.frombuffer(replayed_bytes, np.uint32).tolist()) if replayed_bytes else ()
        self._handles: Handles | None = None
        self._seqs: Seqs | None = None
        self._cuts: _Cuts | None = None

    @property
    def handles(self) -> Handles:
        """`[rows]` uint32."""
        if self._handles is None:
            self._handles = np.frombuffer(self.handle_bytes, np.uint32)
        return self._handles

    @property
    def seqs(self) -> Seqs:
        """`[rows]` uint64."""
        if self._seqs is None:
            self._seqs = np.frombuffer(self.seq_bytes, np.uint64)
        return self._seqs

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
        rows = frame.rows
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
    # Each look at a repeated field of bytes copies: one look per column.
    handles, seqs, lengths, columns = message.handles, message.seqs, message.lengths, list(message.columns)
    replayed = message.replayed_rows
    durables = message.durable_seqs
    if (
        len(seqs) != 2 * len(handles)
        or len(handles) % 4
        or len(lengths) not in {0, len(handles)}
        or len(replayed) % 4
        or len(durables) not in {0, len(seqs)}
    ):
        raise ProtocolError(
            f"a result frame cannot be read: {len(handles)}, {len(seqs)}, {len(lengths)}, {len(replayed)} and "
            f"{len(durables)} bytes of handles, seqs, lengths, replayed_rows and durable_seqs"
        )
    return Frame(
        handles,
        seqs,
        columns,
        np.frombuffer(lengths, np.uint32) if lengths else None,
        replayed,
        durables=np.frombuffer(durables, np.uint64) if durables else None,
    )


def decode_pairs(handles: bytes, seqs: bytes) -> tuple[Handles, Seqs]:
    """Handles and seqs that belong together.

    Raises:
        ProtocolError: they are not equally many.
    """
    if len(seqs) != 2 * len(handles) or len(handles) % 4:
        raise ProtocolError(
            f"{len(handles)} and {len(seqs)} bytes came of handles and seqs, of which there are as many"
        )
    return np.frombuffer(handles, np.uint32), np.frombuffer(seqs, np.uint64)
