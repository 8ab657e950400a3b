"""Protobuf's variable-length integers, for whole columns of numbers.

Invariant: always the shortest form, as every protobuf library writes it.
"""

import numpy as np
from numpy.typing import NDArray

from conveyor.bench.ledger import Integers


def width(value: int) -> int:
    """Bytes of a number above 0; 0 for 0, which proto3 leaves out."""
    return (value.bit_length() + 6) // 7


def widths(values: Integers) -> Integers:
    """As `width`, `[n]` of `[n]`."""
    found = np.zeros(len(values), np.int64)
    limit = 1
    while (above := values >= limit).any():
        found += above
        limit <<= 7
    return found


def encode(value: int) -> bytes:
    """One number, 0 included."""
    out = bytearray()
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def put(rows: NDArray[np.uint8], column: int, size: int, values: Integers) -> None:
    """Writes numbers `[n]` of `size` bytes each into `rows[:, column:column + size]`."""
    for place in range(size - 1):
        rows[:, column + place] = values >> 7 * place & 0x7F | 0x80
    rows[:, column + size - 1] = values >> 7 * (size - 1)


def take(rows: NDArray[np.uint8], column: int, size: int) -> Integers:
    """The numbers `[n]` of `size` bytes each at `rows[:, column:column + size]`; of size 0: zeros."""
    if not size:
        return np.zeros(len(rows), np.int64)
    values = rows[:, column + size - 1].astype(np.int64)
    for place in range(size - 2, -1, -1):
        values = values << 7 | rows[:, column + place] & 0x7F
    return values


def read(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next field begins; IndexError beyond the end."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 128:
            return value, at
        shift += 7
