"""What a columnar frame holds: all rows at once where they are alike, row by row where they are not.

Invariant: as of `inputs`: what passes has the model's types and shapes, and only finite numbers unless the model says
otherwise. A row that cannot be used does not harm the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, WireError, decode_column, decode_integers
from conveyor_proto.fingerprint import fingerprint, fingerprints
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2, spec_pb2
from numpy.typing import NDArray

from conveyor_server.inputs import StepInputs, all_finite, non_finite, wrong_length

# More rows than this are a mistake, and would be answered one by one.
MAX_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """Whose rows they are: the part of a frame that can be read without a model.

    Attributes:
        handles, seqs: int64 `[rows]`.
    """

    handles: NDArray[np.int64]
    seqs: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are all alike, of one length and usable.

    Attributes:
        inputs: one for each of ModelSpec.inputs: `[rows, length, *shape]`, or `[rows, *shape]` without time. Views.
        length: time steps of each row.
        prints: uint64 `[rows]`, their fingerprints.
    """

    inputs: Sequence[Array]
    length: int
    prints: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class FrameColumns:
    """A frame's content.

    Attributes:
        spec: the model's.
        columns: one for each of ModelSpec.inputs: `[sum(lengths), *shape]`, or `[rows, *shape]` without time.
        lengths: int64 `[rows]`.
        acked_seqs: int64 `[rows]`, or None where the client says nothing.
    """

    spec: spec_pb2.ModelSpec
    columns: Sequence[Array]
    lengths: NDArray[np.int64]
    acked_seqs: NDArray[np.int64] | None

    def block(self, longest: int) -> Block | None:
        """All rows as one block; None where they are not alike, or longer than `longest`, or one cannot be used."""
        length = int(self.lengths[0])
        if not 0 < length <= longest or not (self.lengths == length).all():
            return None
        if not self.spec.allow_non_finite_inputs and not all(map(all_finite, self.columns)):
            return None
        rows = len(self.lengths)
        inputs = [
            column.reshape(rows, length, *column.shape[1:]) if item.has_time else column
            for column, item in zip(self.columns, self.spec.inputs, strict=True)
        ]
        return Block(inputs, length, fingerprints(inputs))

    def rows(self, max_time_steps: int, chosen: Sequence[int]) -> Iterator[StepInputs | Fault]:
        """The content of each of the chosen rows, or why it cannot be used."""
        stops = np.cumsum(self.lengths).tolist()
        finite = [self.spec.allow_non_finite_inputs or all_finite(column) for column in self.columns]
        return (
            self._row(row, stops[row] - int(self.lengths[row]), stops[row], finite, max_time_steps) for row in chosen
        )

    def _row(self, row: int, start: int, stop: int, finite: Sequence[bool], max_time_steps: int) -> StepInputs | Fault:
        inputs: list[Array] = []
        for column, item, usable in zip(self.columns, self.spec.inputs, finite, strict=True):
            if item.has_time and not 0 < stop - start <= max_time_steps:
                return wrong_length(stop - start, item, max_time_steps)
            part = column[start:stop] if item.has_time else column[row]
            if not usable and not all_finite(part):
                return non_finite(item)
            inputs.append(part)
        return StepInputs(inputs, stop - start, fingerprint(inputs))


def read_numbers(frame: session_pb2.StepFrame) -> RowNumbers:
    """A frame's handles and seqs.

    Raises:
        WireError: FRAME_INVALID, where they cannot be read, are none or too many, or a seq that none can have.
    """
    handles = decode_integers(frame.handles, np.uint32, -1, "handles").astype(np.int64)
    seqs = decode_integers(frame.seqs, np.uint64, len(handles), "seqs").astype(np.int64)
    if not 0 < len(handles) <= MAX_ROWS:
        raise invalid(f"the frame has {len(handles)} rows: send 1 to {MAX_ROWS}")
    if (seqs < 0).any():
        raise invalid("a seq of the frame is over 2^63 - 1: a session's steps are numbered from 1", "seqs")
    return RowNumbers(handles, seqs)


def read_columns(frame: session_pb2.StepFrame, rows: int, spec: spec_pb2.ModelSpec) -> FrameColumns:
    """A frame's content.

    Args:
        frame: as it came.
        rows: how many it has.
        spec: of the model of all its sessions.

    Raises:
        WireError: FRAME_INVALID, INPUT_MISSING, INPUT_UNKNOWN or INPUT_SIZE: the frame as a whole cannot be read.
    """
    acked = (
        decode_integers(frame.acked_seqs, np.uint64, rows, "acked_seqs").astype(np.int64) if frame.acked_seqs else None
    )
    lengths = (
        decode_integers(frame.lengths, np.uint32, rows, "lengths").astype(np.int64)
        if frame.lengths
        else np.ones(rows, np.int64)
    )
    if len(frame.columns) != len(spec.inputs):
        raise _wrong_count(len(frame.columns), spec)
    time_steps = int(lengths.sum())
    columns = [
        decode_column(data, item, time_steps if item.has_time else rows)
        for data, item in zip(frame.columns, spec.inputs, strict=True)
    ]
    return FrameColumns(spec, columns, lengths, acked)


def invalid(message: str, field: str = "handles") -> WireError:
    """The error of a frame that cannot be read as a whole, to be raised by the caller."""
    return WireError(Fault(e.ERROR_REASON_FRAME_INVALID, message, {"field": field}))


def _wrong_count(count: int, spec: spec_pb2.ModelSpec) -> WireError:
    missing = count < len(spec.inputs)
    reason = e.ERROR_REASON_INPUT_MISSING if missing else e.ERROR_REASON_INPUT_UNKNOWN
    name = spec.inputs[count].name if missing else f"#{len(spec.inputs)}"
    message = f"the model takes {len(spec.inputs)} columns and {count} came: send one for each input, in order"
    return WireError(Fault(reason, message, {"input": name, "expected": str(len(spec.inputs)), "got": str(count)}))
