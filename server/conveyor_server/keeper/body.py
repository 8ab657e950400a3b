"""A session's state and last answers as the bytes of its record, many sessions at once.

Invariant: what `decode` accepts is what `encode` wrote for that very session and model, bit for bit: a checksum covers
all of it, and begins with the session's name and the model's digest, so that a record that was torn, altered or put in
another's place is refused.

Layout, little-endian: HEAD; then each of ModelSpec.states in order, C order (none of a fresh session); then each
answer, oldest first: ANSWER and the outputs in the order of ModelSpec.outputs; then zeros up to a whole 64-bit word.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.fingerprint import fingerprints
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server.sessions.record import Recorded

MAGIC = b"CVB1"
# The checksum is the fingerprint (conveyor_proto.fingerprint) of the body with zeros in its place, plus `seed`: of
# all sessions at once, where a CRC would take as long as writing them does.
HEAD = np.dtype(
    [
        ("magic", "S4"),
        ("state_bytes", "<u4"),
        ("checksum", "<u8"),
        ("seq", "<u8"),
        ("time_steps", "<u8"),
        ("last_used", "<f8"),
        ("answers", "<u8"),
    ]
)
ANSWER = np.dtype([("seq", "<u8"), ("fingerprint", "<u8"), ("length", "<u4"), ("bytes", "<u4")])
_CHECKSUM = slice(8, 16)
_WORD = 8


class BodyInvalid(Exception):  # noqa: N818 - it says what happened
    """The bytes are no body of that session; the message says why."""


@dataclass(slots=True)
class Piece:
    """Sessions of one model that have equally many answers of equal shapes, as of one moment.

    Attributes:
        seeds: uint32 `[n]`, see `seed`.
        seqs, time_steps: int64 `[n]`.
        last_used: float64 `[n]`, unix seconds.
        states: one `[n, *shape]` for each of ModelSpec.states; empty: fresh sessions.
        answers: oldest first: seqs int64 `[n]`, fingerprints uint64 `[n]`, time steps, and outputs `[n, ...]`.
    """

    seeds: list[int]
    seqs: NDArray[np.int64]
    time_steps: NDArray[np.int64]
    last_used: NDArray[np.float64]
    states: Sequence[Array]
    answers: Sequence[tuple[NDArray[np.int64], NDArray[np.uint64], int, Sequence[Array]]]


@dataclass(frozen=True, slots=True)
class Body:
    """What a record holds of a session's progress.

    Attributes:
        seq, time_steps: applied.
        last_used: unix seconds.
        states: one `[*shape]` for each of ModelSpec.states; None: a fresh session.
        answers: oldest first.
    """

    seq: int
    time_steps: int
    last_used: float
    states: Sequence[Array] | None
    answers: Sequence[Recorded]


def seed(session_id: str, digest: str) -> int:
    """What makes the checksum of that session's bodies its own."""
    return seeds((session_id,), digest)[0]


def seeds(session_ids: Sequence[str], digest: str) -> list[int]:
    """`seed` of several sessions of one model."""
    start = zlib.crc32(digest.encode())
    return [zlib.crc32(session_id.encode(), start) for session_id in session_ids]


def encode(piece: Piece) -> tuple[bytes, int]:
    """The bodies of a piece's sessions, one after the other, and the bytes of each. Any thread."""
    count = len(piece.seeds)
    columns: list[NDArray[np.uint8]] = [_bytes(array, count) for array in piece.states]
    state_bytes = sum(column.shape[1] for column in columns)
    for seqs, prints, length, outputs in piece.answers:
        data = [_bytes(array, count) for array in outputs]
        head = np.zeros(count, ANSWER)
        head["seq"], head["fingerprint"], head["length"] = seqs, prints, length
        head["bytes"] = sum(column.shape[1] for column in data)
        columns += [_bytes(head, count), *data]
    size = HEAD.itemsize + sum(column.shape[1] for column in columns)
    size += -size % _WORD
    rows = np.zeros((count, size), np.uint8)
    head = np.zeros(count, HEAD)
    head["magic"], head["seq"], head["time_steps"] = MAGIC, piece.seqs, piece.time_steps
    head["last_used"], head["state_bytes"], head["answers"] = piece.last_used, state_bytes, len(piece.answers)
    rows[:, : HEAD.itemsize] = _bytes(head, count)
    at = HEAD.itemsize
    for column in columns:
        rows[:, at : at + column.shape[1]] = column
        at += column.shape[1]
    sums = fingerprints([rows]) + np.array(piece.seeds, np.uint64)
    rows[:, _CHECKSUM] = sums.astype("<u8").view(np.uint8).reshape(count, -1)
    return rows.tobytes(), size


def decode(body: bytes, start: int, spec: spec_pb2.ModelSpec) -> Body:
    """The content of a body. Any thread.

    Args:
        body: as it came from the store.
        start: `seed` of the session that it should be of.
        spec: of the session's model.

    Raises:
        BodyInvalid: it is torn, altered, another session's, or of another model.
    """
    if len(body) < HEAD.itemsize or len(body) % _WORD or body[:4] != MAGIC:
        raise BodyInvalid("is not one, or is cut short")
    (head,) = np.frombuffer(body, HEAD, 1)
    plain = np.frombuffer(body, np.uint8)[np.newaxis].copy()
    plain[:, _CHECKSUM] = 0
    if fingerprints([plain])[0] + np.uint64(start) != head["checksum"]:
        raise BodyInvalid("was torn, altered or written for another session or model: its checksum does not fit")
    state_bytes, at = int(head["state_bytes"]), HEAD.itemsize
    shapes = [(to_numpy_dtype(item.dtype), tuple(item.shape)) for item in spec.states]
    states: list[Array] | None = None
    if state_bytes or (not shapes and int(head["seq"])):
        states, end = _cut(body, at, shapes)
        if end - at != state_bytes:
            raise BodyInvalid(f"holds {state_bytes} bytes of state, and the model has {end - at}")
    at += state_bytes
    answers: list[Recorded] = []
    for _ in range(int(head["answers"])):
        if at + ANSWER.itemsize > len(body):
            raise BodyInvalid(f"says that it holds {int(head['answers'])} answers, and is shorter")
        (one,) = np.frombuffer(body, ANSWER, 1, at)
        length = int(one["length"])
        at += ANSWER.itemsize
        like = [
            (to_numpy_dtype(item.dtype), (length, *item.shape) if item.has_time else (*item.shape,))
            for item in spec.outputs
        ]
        outputs, end = _cut(body, at, like)
        if end - at != int(one["bytes"]):
            raise BodyInvalid("holds answers of other shapes than the model gives")
        answers.append(Recorded(int(one["seq"]), int(one["fingerprint"]), length, outputs))
        at = end
    if at + -at % _WORD != len(body):
        raise BodyInvalid(f"has {len(body)} bytes and its parts have {at}")
    return Body(int(head["seq"]), int(head["time_steps"]), float(head["last_used"]), states, answers)


def _bytes(array: Array, count: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(count, -1).view(np.uint8)


def _cut(
    body: bytes, at: int, shapes: Sequence[tuple[np.dtype[np.generic], tuple[int, ...]]]
) -> tuple[list[Array], int]:
    """Arrays of these shapes that lie one after the other from `at` on, copied, and where they end."""
    arrays: list[Array] = []
    for dtype, shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        if at + count * dtype.itemsize > len(body):
            raise BodyInvalid("is shorter than the model's states and answers")
        arrays.append(np.frombuffer(body, dtype, count, at).reshape(shape).copy())
        at += count * dtype.itemsize
    return arrays, at
