"""Steps in a message each: requests are written, and results read, as arrays of bytes with a row for each message.

Invariant: what is written is letter for letter what protobuf writes, DATA frame and gRPC prefix included. A result is
read by arrays only if its fixed bytes are those of a layout that was worked out from a message of the same kind;
whatever differs is left to protobuf.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conveyor.bench import varint
from conveyor.bench.http2 import FRAME_HEADER_BYTES, MESSAGE_PREFIX_BYTES
from conveyor.bench.inbox import Inbox
from conveyor.bench.ledger import Integers
from conveyor.bench.model import Column
from conveyor.bench.sockets import SPARE_BYTES

Bytes = NDArray[np.uint8]

_STEP, _HANDLE, _SEQ, _INPUTS, _ACKED = b"\x12", b"\x08", b"\x10", b"\x1a", b"\x28"
_TENSOR_DATA = b"\x22"
_PREFIX_BYTES = FRAME_HEADER_BYTES + MESSAGE_PREFIX_BYTES
# Tag and size of the result, handle, seq and the first output's tag, each number at its longest, fit into so much.
_HEAD_BYTES = 32
_MAX_LAYOUTS = 16


class StepEncoder:
    """Writes steps.

    Args:
        stream_ids: HTTP/2 stream of each session, `[sessions]`.
        handles: of each session, `[sessions]`, above 0.
        columns: the inputs.
    """

    def __init__(self, stream_ids: Integers, handles: Integers, columns: Sequence[Column]) -> None:
        self._stream_ids = stream_ids
        self._handles = handles
        self._handle_widths = varint.widths(handles)
        self._handle_width = int(self._handle_widths[0])
        self._same_handle_width = bool((self._handle_widths == self._handle_width).all())
        self._bodies = _bodies(columns)
        self._pool = len(self._bodies)
        self._heads: dict[tuple[int, int, int], Bytes] = {}

    def encode(self, sessions: Integers, seqs: Integers, acked: Integers) -> tuple[Bytes, Integers]:
        """Writes a DATA frame for each step.

        Args:
            sessions: `[n]`.
            seqs: `[n]`, above 0.
            acked: `[n]`.

        Returns:
            All frames one after the other, and where each begins and the last one ends, `[n + 1]`.
        """
        low = (_width(np.minimum.reduce(seqs)), _width(np.minimum.reduce(acked)))
        high = (_width(np.maximum.reduce(seqs)), _width(np.maximum.reduce(acked)))
        if low == high and self._same_handle_width:
            rows = self._rows(sessions, seqs, acked, (self._handle_width, *low))
            return rows.reshape(-1), np.arange(0, (len(rows) + 1) * rows.shape[1], rows.shape[1])
        return self._mixed(sessions, seqs, acked)

    def _mixed(self, sessions: Integers, seqs: Integers, acked: Integers) -> tuple[Bytes, Integers]:
        """Steps whose numbers take different sizes: a block of rows for each combination, dealt out to their places."""
        keys = np.stack([self._handle_widths[sessions], varint.widths(seqs), varint.widths(acked)], axis=1)
        kinds, kind_of = np.unique(keys, axis=0, return_inverse=True)
        kind_of = kind_of.reshape(-1)
        members = [np.flatnonzero(kind_of == kind) for kind in range(len(kinds))]
        blocks = [
            self._rows(sessions[chosen], seqs[chosen], acked[chosen], (int(key[0]), int(key[1]), int(key[2])))
            for chosen, key in zip(members, kinds, strict=True)
        ]
        begins = np.zeros(len(sessions) + 1, np.int64)
        for chosen, block in zip(members, blocks, strict=True):
            begins[chosen + 1] = block.shape[1]
        np.cumsum(begins, out=begins)
        frames = np.empty(begins[-1], np.uint8)
        for chosen, block in zip(members, blocks, strict=True):
            frames[begins[chosen][:, None] + np.arange(block.shape[1])] = block
        return frames, begins

    def _rows(self, sessions: Integers, seqs: Integers, acked: Integers, key: tuple[int, int, int]) -> Bytes:
        """The frames `[n, bytes]` of steps whose handle, seq and acked_seq take as many bytes as the key says."""
        _, seq_width, acked_width = key
        heads = self._heads.get(key)
        if heads is None:
            heads = self._make_heads(key)
        head, body = heads.shape[1], self._bodies.shape[1]
        tail = 1 + acked_width if acked_width else 0
        rows = np.empty((len(sessions), head + body + tail), np.uint8)
        rows[:, :head] = heads[sessions]
        rows[:, head : head + body] = self._bodies[sessions % self._pool if self._pool < len(heads) else sessions]
        varint.put(rows, head - seq_width, seq_width, seqs)
        if tail:
            rows[:, head + body] = _ACKED[0]
            varint.put(rows, head + body + 1, acked_width, acked)
        return rows

    def _make_heads(self, key: tuple[int, int, int]) -> Bytes:
        """What stands before the inputs, `[sessions, bytes]`, with 0 for seq; right only for handles of that size."""
        handle_width, seq_width, acked_width = key
        step_bytes = 2 + handle_width + seq_width + self._bodies.shape[1] + (1 + acked_width if acked_width else 0)
        step_size = varint.encode(step_bytes)
        message_bytes = 1 + len(step_size) + step_bytes
        head = b"".join(
            [
                ((message_bytes + MESSAGE_PREFIX_BYTES) & 0xFFFFFF).to_bytes(3, "big") + bytes(6),
                b"\x00" + message_bytes.to_bytes(4, "big"),
                _STEP + step_size,
                _HANDLE + bytes(handle_width),
                _SEQ + bytes(seq_width),
            ]
        )
        heads = np.tile(np.frombuffer(head, np.uint8), (len(self._handles), 1))
        heads[:, 5:9] = self._stream_ids.astype(">u4")[:, None].view(np.uint8)
        varint.put(heads, len(head) - seq_width - 1 - handle_width, handle_width, self._handles)
        if len(self._heads) >= _MAX_LAYOUTS:
            self._heads.clear()
        self._heads[key] = heads
        return heads


def _width(value: np.int64) -> int:
    return varint.width(int(value))


def _bodies(columns: Sequence[Column]) -> Bytes:
    """The inputs of a step as protobuf fields, `[pool, bytes]`."""
    parts = []
    for column in columns:
        pool, size = column.data.shape
        tensor = _TENSOR_DATA + varint.encode(size)
        prefix = _INPUTS + varint.encode(len(tensor) + size) + tensor
        parts += [np.tile(np.frombuffer(prefix, np.uint8), (pool, 1)), column.data]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a result's handle and seq stand.

    Attributes:
        size: bytes of such a message.
        mask: `[bytes]`: bits that are the same in all results of the layout.
        value: `[bytes]`: those bits.
    """

    size: int
    mask: Bytes
    value: Bytes
    handle_at: int
    handle_width: int
    seq_at: int
    seq_width: int


class StepDecoder:
    """Reads results."""

    def __init__(self) -> None:
        self._layouts: list[_Layout] = []
        self._reach = np.arange(_HEAD_BYTES)

    def decode(self, inbox: Inbox, begin: int, end: int) -> tuple[Integers, Integers, Integers, list[int]]:
        """Reads messages `begin` to `end` of those in the inbox's buffer.

        Returns:
            Streams, handles and seqs of the results, in order; and the indices of messages that are none, or that a
            layout does not fit.
        """
        streams = np.array(inbox.streams[begin:end])
        offsets = np.array(inbox.offsets[begin:end])
        heads = np.frombuffer(inbox.buffer, np.uint8)[offsets[:, None] + self._reach]
        sizes = inbox.sizes[begin:end]
        layout = self._layouts[0] if self._layouts else None
        if layout is not None and sizes.count(layout.size) == len(sizes):
            fits = _fits(heads, layout)
            if np.count_nonzero(fits) == len(fits):
                return streams, *_numbers(heads, layout), []
        handles, seqs, others = self._mixed(heads, np.array(sizes))
        if not others:
            return streams, handles, seqs, []
        results = np.ones(len(heads), bool)
        results[others] = False
        return streams[results], handles[results], seqs[results], [begin + index for index in others]

    def _mixed(self, heads: Bytes, sizes: Integers) -> tuple[Integers, Integers, list[int]]:
        """Handles `[n]` and seqs `[n]` of messages of several layouts; and which are none."""
        handles = np.zeros(len(heads), np.int64)
        seqs = np.zeros(len(heads), np.int64)
        left = np.ones(len(heads), bool)
        others: list[int] = []
        known = iter(list(self._layouts))
        while left.any():
            layout = next(known, None) or self._learn(heads, sizes, left, others)
            if layout is None:
                break
            found = left & (sizes == layout.size) & _fits(heads, layout)
            if found.any():
                handles[found], seqs[found] = _numbers(heads[found], layout)
                left &= ~found
        return handles, seqs, others

    def _learn(self, heads: Bytes, sizes: Integers, left: NDArray[np.bool_], others: list[int]) -> _Layout | None:
        """The layout of the first message that is left and has one; those before it are others. None: there is none."""
        for index in np.flatnonzero(left).tolist():
            layout = _layout_of(heads[index], int(sizes[index]))
            if layout is not None:
                # The newest is what comes next: numbers only grow.
                self._layouts = [layout, *self._layouts[: _MAX_LAYOUTS - 1]]
                return layout
            others.append(index)
            left[index] = False
        return None


def _fits(heads: Bytes, layout: _Layout) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = np.logical_and.reduce(
        (heads[:, : len(layout.mask)] & layout.mask) == layout.value, axis=1
    )
    return fits


def _numbers(heads: Bytes, layout: _Layout) -> tuple[Integers, Integers]:
    return (
        varint.take(heads, layout.handle_at, layout.handle_width),
        varint.take(heads, layout.seq_at, layout.seq_width),
    )


def _layout_of(head: Bytes, size: int) -> _Layout | None:
    """The layout of a StepResult with handle, seq and an output; None of anything else."""
    data = memoryview(head.tobytes())
    try:
        if data[0] != _STEP[0]:
            return None
        length, at = varint.read(data, 1)
        if at + length != size or data[at] != _HANDLE[0]:
            return None
        handle_at = at + 1
        _, at = varint.read(data, handle_at)
        if data[at] != _SEQ[0]:
            return None
        seq_at = at + 1
        _, end = varint.read(data, seq_at)
        if end >= size or data[end] != _INPUTS[0]:
            return None
    except IndexError:
        return None
    mask = np.full(end + 1, 0xFF, np.uint8)
    # Of a number, only how many bytes it takes is fixed.
    mask[handle_at:at] = mask[seq_at:end] = 0x80
    return _Layout(size, mask, head[: end + 1] & mask, handle_at, at - handle_at, seq_at, end - seq_at)


assert _HEAD_BYTES <= SPARE_BYTES  # noqa: S101 - a head may be read behind the last message
