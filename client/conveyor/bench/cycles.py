"""Frames that come in the same order again and again, read as columns.

A busy gRPC server writes, for each answer, a WINDOW_UPDATE for the stream, the DATA and a WINDOW_UPDATE for the
connection, or any part of that. One by one these three cost more than all else that is done for a message.

Invariant: a run of cycles ends before the first frame that differs from the pattern in anything but its stream and what
it carries, so that nothing unusual is ever taken for usual.
"""

import functools
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conveyor.bench.http2 import FRAME_HEADER_BYTES, MESSAGE_PREFIX_BYTES, Frame
from conveyor.bench.ledger import Integers

_WORD = struct.Struct(">I")
# Frames that are looked at to find a cycle of at most three, and so the fewest that are read by arrays.
_LOOK_AT = 9
_LONGEST = 3
# Length and type, the first four bytes of a frame.
WINDOW_UPDATE = 4 << 8 | Frame.WINDOW_UPDATE


@dataclass(frozen=True, slots=True)
class Pattern:
    """One cycle: WINDOW_UPDATE frames, and at most one DATA frame that holds just one message.

    Attributes:
        words: length and type of each frame.
        stride: bytes of all of them.
        fixed_at: places of the bytes that are the same in each cycle.
        fixed: those bytes.
        numbers_at: places of the bytes of numbers: the stream of each frame, then the increment of each WINDOW_UPDATE.
        message_at: where the message begins, behind gRPC's prefix; 0: there is none.
        message_bytes: its size.
    """

    words: tuple[int, ...]
    stride: int
    fixed_at: NDArray[np.intp]
    fixed: NDArray[np.uint8]
    numbers_at: NDArray[np.intp]
    message_at: int
    message_bytes: int


@dataclass(frozen=True, slots=True)
class Cycles:
    """A run of cycles.

    Attributes:
        pattern: what each of them is.
        count: how many.
        ids: HTTP/2's number of each frame's stream, `[count, frames of a cycle]`.
        increments: of each WINDOW_UPDATE, `[count, WINDOW_UPDATE frames of a cycle]`.
    """

    pattern: Pattern
    count: int
    ids: Integers
    increments: Integers


def find(buffer: memoryview, begin: int, end: int) -> Cycles | None:
    """The cycles from `begin` on; None: there are none that can be read so.

    That DATA is on a stream of ours is for the caller to see.
    """
    words = _cycle(buffer, begin, end)
    pattern = _pattern(words) if words else None
    if pattern is None:
        return None
    count = (end - begin) // pattern.stride
    cycles = np.ndarray((count, pattern.stride), np.uint8, buffer, begin)
    same = np.logical_and.reduce(cycles.take(pattern.fixed_at, axis=1) == pattern.fixed, axis=1)
    if np.count_nonzero(same) < count:
        count = int(same.argmin())
    if not count:
        return None
    numbers = cycles[:count].take(pattern.numbers_at, axis=1).view(">u4").astype(np.int64) & 0x7FFFFFFF
    return Cycles(pattern, count, numbers[:, : len(words)], numbers[:, len(words) :])


def _cycle(buffer: memoryview, at: int, end: int) -> tuple[int, ...]:
    """The shortest cycle that the next frames keep to; empty: none."""
    words: list[int] = []
    for _ in range(_LOOK_AT):
        if at + FRAME_HEADER_BYTES > end:
            return ()
        word = _WORD.unpack_from(buffer, at)[0]
        at += FRAME_HEADER_BYTES + (word >> 8)
        words.append(word)
    if at > end:
        return ()
    for length in range(1, _LONGEST + 1):
        if words[length:] == words[:-length]:
            return tuple(words[:length])
    return ()


@functools.lru_cache(maxsize=64)
def _pattern(words: tuple[int, ...]) -> Pattern | None:
    """The pattern of such frames; None where other frames than the usual are among them."""
    data = [word for word in words if word != WINDOW_UPDATE]
    if len(data) > 1 or any(word & 0xFF != Frame.DATA or word >> 8 < MESSAGE_PREFIX_BYTES for word in data):
        return None
    fixed: dict[int, int] = {}
    ids: list[int] = []
    increments: list[int] = []
    message_at = message_bytes = at = 0
    for word in words:
        # No flags: of DATA they change what it says, WINDOW_UPDATE has none.
        fixed |= dict(enumerate(_WORD.pack(word) + b"\0", at))
        ids += range(at + 5, at + 9)
        body = at + FRAME_HEADER_BYTES
        if word == WINDOW_UPDATE:
            increments += range(body, body + 4)
        else:
            message_at, message_bytes = body + MESSAGE_PREFIX_BYTES, (word >> 8) - MESSAGE_PREFIX_BYTES
            fixed |= dict(enumerate(b"\0" + _WORD.pack(message_bytes), body))
        at = body + (word >> 8)
    places, values = list(fixed), list(fixed.values())
    return Pattern(
        words=words,
        stride=at,
        fixed_at=np.array(places),
        fixed=np.array(values, np.uint8),
        numbers_at=np.array(ids + increments),
        message_at=message_at,
        message_bytes=message_bytes,
    )
