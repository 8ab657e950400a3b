"""Steps of many sessions in one message: StepFrames are written and ResultFrames read column by column.

Invariant: the columns of a reply are looked at for their sizes alone; values are not copied.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from conveyor.bench import varint
from conveyor.bench.ledger import Integers
from conveyor.bench.model import Column

_FRAME = b"\x1a"
_HANDLES, _SEQS, _LENGTHS, _COLUMN, _ACKED = b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x32"
_BYTES_FIELD = 2


class FrameEncoder:
    """Writes frames of one stream.

    Args:
        sessions: indices of the stream's sessions, one after the other.
        handles: of each, `[sessions of the stream]`.
        time_steps: of each step.
        columns: the inputs.
    """

    def __init__(self, sessions: range, handles: Integers, time_steps: int, columns: Sequence[Column]) -> None:
        self._first = sessions.start
        self._handles = handles.astype("<u4")
        self._time_steps = time_steps
        pools = [np.arange(sessions.start, sessions.stop) % len(column.data) for column in columns]
        self._columns = [column.data[pool] for column, pool in zip(columns, pools, strict=True)]
        # Mostly a frame holds all sessions of its stream in order.
        self._whole = (self._handles.tobytes(), [column.tobytes() for column in self._columns])

    def encode(self, sessions: Integers, seqs: Integers, acked: Integers) -> bytes:
        """One message of these steps, with gRPC's prefix.

        Args:
            sessions: `[rows]`; one that stands several times has its steps in order.
            seqs: `[rows]`.
            acked: `[rows]`.
        """
        rows = sessions - self._first
        if len(rows) == len(self._handles) and rows[0] == 0 and (rows[1:] - rows[:-1] == 1).all():
            handles, columns = self._whole
        else:
            handles, columns = self._handles[rows].tobytes(), [column[rows].tobytes() for column in self._columns]
        parts = [*_field(_HANDLES, handles), *_field(_SEQS, seqs.astype("<u8").tobytes())]
        if self._time_steps > 1:
            parts += _field(_LENGTHS, np.full(len(rows), self._time_steps, "<u4").tobytes())
        for column in columns:
            parts += _field(_COLUMN, column)
        if acked.any():
            parts += _field(_ACKED, acked.astype("<u8").tobytes())
        size = sum(map(len, parts))
        prefix = _FRAME + varint.encode(size)
        return b"".join([b"\x00", (len(prefix) + size).to_bytes(4, "big"), prefix, *parts])


def _field(tag: bytes, data: bytes) -> list[bytes]:
    return [tag + varint.encode(len(data)), data]


def decode_frame(message: memoryview) -> tuple[NDArray[np.uint32], NDArray[np.uint64]] | None:
    """Handles and seqs `[rows]` of a ResultFrame (or of an echoed StepFrame); None of another message."""
    if not message or message[0] != _FRAME[0]:
        return None
    _, at = varint.read(message, 1)
    found: dict[int, memoryview] = {}
    while at < len(message):
        key, at = varint.read(message, at)
        size, at = varint.read(message, at)
        if key & 7 == _BYTES_FIELD:
            found.setdefault(key >> 3, message[at : at + size])
            at += size
    return np.frombuffer(found.get(1, b""), "<u4"), np.frombuffer(found.get(2, b""), "<u8")
