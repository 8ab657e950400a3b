"""Frames of equal kind and size that follow one another, read as columns.

Invariant: a run ends before the first frame that differs from its first one in anything but its stream (and in what
it carries), so that nothing unusual is ever taken for usual.
"""

import numpy as np
from numpy.typing import NDArray

from conveyor.bench.http2 import FRAME_HEADER_BYTES, MESSAGE_PREFIX_BYTES
from conveyor.bench.ledger import Integers

# For fewer frames, arrays cost more than they save.
SHORTEST = 8


def data_run(buffer: memoryview, begin: int, end: int) -> Integers:
    """Stream ids `[n]` of the DATA frames from `begin` on that are as long as the first, and hold one message each."""
    stride, count = _stride(buffer, begin, end)
    size = stride - FRAME_HEADER_BYTES - MESSAGE_PREFIX_BYTES
    differs = _column(buffer, begin, count, stride, ">u4") != (size + MESSAGE_PREFIX_BYTES) << 8
    # Flags of the frame, and whether the message is compressed.
    differs |= _column(buffer, begin + 4, count, stride, "u1") != 0
    differs |= _column(buffer, begin + FRAME_HEADER_BYTES, count, stride, "u1") != 0
    differs |= _column(buffer, begin + FRAME_HEADER_BYTES + 1, count, stride, ">u4") != size
    return _column(buffer, begin + 5, _until(differs), stride, ">u4").astype(np.int64)


def window_run(buffer: memoryview, begin: int, end: int) -> tuple[Integers, Integers]:
    """Streams' ids `[n]` and increments `[n]` of the WINDOW_UPDATE frames from `begin` on."""
    stride, count = _stride(buffer, begin, end)
    word = int.from_bytes(buffer[begin : begin + 4], "big")
    count = _until(_column(buffer, begin, count, stride, ">u4") != word)
    ids = _column(buffer, begin + 5, count, stride, ">u4").astype(np.int64)
    return ids, _column(buffer, begin + FRAME_HEADER_BYTES, count, stride, ">u4").astype(np.int64) & 0x7FFFFFFF


def _stride(buffer: memoryview, begin: int, end: int) -> tuple[int, int]:
    """Bytes of the first frame, and how many such would fit."""
    stride = FRAME_HEADER_BYTES + int.from_bytes(buffer[begin : begin + 3], "big")
    return stride, (end - begin) // stride


def _column(buffer: memoryview, at: int, count: int, stride: int, dtype: str) -> NDArray[np.generic]:
    return np.ndarray((count,), dtype, buffer, at, (stride,))


def _until(differs: NDArray[np.bool_]) -> int:
    """How many from the first on are the same."""
    return int(differs.argmax()) if np.count_nonzero(differs) else len(differs)
