"""The record: the last one-token answers of all sessions of an engine, as arrays.

Invariants: what it holds of a session are consecutive seqs; a step sent again finds the bits that were sent before. An
answer lies at position `(seq - base_seq) % credit`, and a session that acknowledges always finds position 0 free: so a
session that is idle costs one answer, and the planes of higher positions are made when somebody needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server.sessions.table import APPLIED_SEQ, BASE_SEQ, CREDIT, FIRST_SEQ, LAST_SEQ, SessionTable


@dataclass(frozen=True, slots=True)
class Recorded:
    """One applied step: its number, what was in it, and what came out."""

    seq: int
    fingerprint: int
    length: int
    outputs: Sequence[Array]


class Record:
    """Answers of one engine's sessions, by row of the session table. Core thread only.

    Args:
        number: of this record.
        outputs: ModelSpec.outputs.
        table: the sessions.
    """

    def __init__(self, number: int, outputs: Sequence[spec_pb2.TensorSpec], table: SessionTable) -> None:
        self.number = number
        self.table = table
        self._rows = [
            (to_numpy_dtype(item.dtype), (1, *item.shape) if item.has_time else (*item.shape,)) for item in outputs
        ]
        # By position: the outputs of all sessions. Pages that no session wrote take no memory.
        self._planes: list[list[Array]] = []
        self._prints: list[NDArray[np.uint64]] = []

    def add(
        self,
        where: "slice | NDArray[np.int64]",
        cells: NDArray[np.int64],
        seqs: NDArray[np.int64],
        prints: NDArray[np.uint64],
        outputs: Sequence[Array],
    ) -> None:
        """Records one answer of each row: outputs `[rows, 1, *shape]`, or `[rows, *shape]` without time.

        `cells` is what the table's `look` gave of these rows; to be `put` by the caller.
        """
        first, last = cells[:, FIRST_SEQ], cells[:, LAST_SEQ]
        empty = last < first
        empty |= last != seqs - 1
        several = np.count_nonzero(empty)
        if several == len(empty):
            # Every client had acknowledged all there was: the usual case.
            cells[:, FIRST_SEQ] = cells[:, LAST_SEQ] = cells[:, BASE_SEQ] = seqs
            self._put(0, where, prints, outputs)
            return
        base = cells[:, BASE_SEQ]
        if several:
            first[empty] = base[empty] = seqs[empty]
        credit = cells[:, CREDIT]
        np.maximum(first, seqs - credit + 1, out=first)
        cells[:, LAST_SEQ] = seqs
        positions = (seqs - base) % credit
        lowest = int(positions.min())
        if lowest == int(positions.max()):
            self._put(lowest, where, prints, outputs)
            return
        rows = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        for position in np.unique(positions).tolist():
            here = positions == position
            self._put(position, rows[here], prints[here], [array[here] for array in outputs])

    def keep(
        self,
        where: "slice | NDArray[np.int64]",
        seqs: NDArray[np.int64],
        prints: NDArray[np.uint64],
        length: int,
        outputs: Sequence[Array],
    ) -> None:
        """Has each session keep an answer of several time steps by itself, where the table says that it is applied."""
        rows = range(where.start, where.stop) if isinstance(where, slice) else where.tolist()
        for index, row in enumerate(rows):
            session = self.table.sessions[row]
            if session is None:
                raise AssertionError("a session that has run is gone")
            # Copies: what is kept for replay must not keep the whole run's outputs.
            own = [array[index].copy() for array in outputs]
            session.answers.add(Recorded(int(seqs[index]), int(prints[index]), length, own))

    def plane(self, position: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint64]]:
        """Where answers at a position lie: uint8 `[capacity, bytes]` of each output, and the prints `[capacity]`."""
        self._make(position)
        planes = [plane.reshape(len(plane), -1).view(np.uint8) for plane in self._planes[position]]
        return planes, self._prints[position]

    def add_one(self, row: int, answer: Recorded) -> None:
        """`add` for one session: an answer of one time step."""
        table, seq = self.table, answer.seq
        first, last = int(table.first_seq[row]), int(table.last_seq[row])
        if last < first or last != seq - 1:
            first = table.base_seq[row] = seq
        credit = int(table.credit[row])
        table.first_seq[row] = max(first, seq - credit + 1)
        table.last_seq[row] = seq
        position = (seq - int(table.base_seq[row])) % credit
        self._make(position)
        for plane, array in zip(self._planes[position], answer.outputs, strict=True):
            plane[row] = array
        self._prints[position][row] = answer.fingerprint

    def acknowledge_one(self, row: int, acked_seq: int) -> None:
        """`acknowledge` for one session."""
        table = self.table
        after = min(acked_seq, int(table.applied_seq[row])) + 1
        table.first_seq[row] = max(table.first_seq[row], after)

    @staticmethod
    def acknowledge(cells: NDArray[np.int64], acked_seqs: NDArray[np.int64]) -> None:
        """Drops answers that clients say they hold. A word about steps that were not applied counts for nothing.

        `cells` as for `add`; what a session keeps beside the record is dropped by `trim`.
        """
        after = np.minimum(acked_seqs, cells[:, APPLIED_SEQ]) + 1
        first = cells[:, FIRST_SEQ]
        np.maximum(first, after, out=first)

    def trim(self, where: "slice | NDArray[np.int64]", acked_seqs: NDArray[np.int64] | None = None) -> None:
        """Drops what the sessions of these rows keep beside the record and need no more. The table is up to date."""
        table = self.table
        kept = table.kept[where]
        if not np.count_nonzero(kept):
            return
        for index in np.flatnonzero(kept).tolist():
            row = where.start + index if isinstance(where, slice) else int(where[index])
            self.trim_one(row, 0 if acked_seqs is None else int(acked_seqs[index]))

    def trim_one(self, row: int, acked_seq: int) -> None:
        """`trim` for the session of a row, which keeps something."""
        session = self.table.sessions[row]
        if session is not None:
            session.answers.trim(min(acked_seq, session.applied_seq))

    def get(self, row: int, seq: int) -> Recorded | None:
        """The answer of `seq`, or None where it is not held; the outputs are copies."""
        table = self.table
        if not table.first_seq[row] <= seq <= table.last_seq[row]:
            return None
        position = int(seq - table.base_seq[row]) % int(table.credit[row])
        outputs = [plane[row].copy() for plane in self._planes[position]]
        return Recorded(seq, int(self._prints[position][row]), 1, outputs)

    def seqs(self, row: int) -> range:
        """The answers that are held of a row."""
        return range(int(self.table.first_seq[row]), int(self.table.last_seq[row]) + 1)

    def copies(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[NDArray[np.uint64], list[Array]]:
        """What lies at a position of each row: fingerprints `[rows]`, and outputs `[rows, 1, *shape]` or as `add`."""
        lowest = int(positions.min())
        if lowest == int(positions.max()):
            return self._prints[lowest][rows], [plane[rows] for plane in self._planes[lowest]]
        prints = np.empty(len(rows), np.uint64)
        outputs = [np.empty((len(rows), *shape), dtype) for dtype, shape in self._rows]
        for position in np.unique(positions).tolist():
            here = positions == position
            prints[here] = self._prints[position][rows[here]]
            for output, plane in zip(outputs, self._planes[position], strict=True):
                output[here] = plane[rows[here]]
        return prints, outputs

    def _put(
        self, position: int, rows: "slice | NDArray[np.int64]", prints: NDArray[np.uint64], outputs: Sequence[Array]
    ) -> None:
        self._make(position)
        for plane, array in zip(self._planes[position], outputs, strict=True):
            plane[rows] = array
        self._prints[position][rows] = prints

    def _make(self, position: int) -> None:
        """Sees to it that there are planes up to a position."""
        capacity = len(self.table.sessions)
        while len(self._planes) <= position:
            self._planes.append([np.zeros((capacity, *shape), dtype) for dtype, shape in self._rows])
            self._prints.append(np.zeros(capacity, np.uint64))
