"""One step of many sessions, in numpy terms: packed into columns on the way out, unpacked into the caller's form.

Invariant: rows keep the caller's order; the form of the answer follows from the form of the input alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import errors_pb2 as e
from numpy.typing import NDArray

from conveyor._core.frame import Lengths
from conveyor._core.ledger import Picked
from conveyor._core.signature import Field, Outputs, Signature
from conveyor.errors import ProtocolError


class Form(Enum):
    """How the time steps of several rows were given, and how the answers go back."""

    # `[rows, *shape]`: one time step each.
    ONE = auto()
    # `[rows, time, *shape]`: equally long chunks.
    CHUNK = auto()
    # A list of `[time, *shape]`.
    LIST = auto()
    # A tuple of `[sum(lengths), *shape]` and `[rows]` lengths.
    PACKED = auto()


@dataclass(frozen=True, slots=True)
class Batch:
    """Several rows' inputs, checked, cast and packed: copies, for the caller's arrays may change before they are sent.

    Attributes:
        fields: the model's inputs.
        columns: the bytes of each: `[sum(lengths), *shape]`, or `[rows, *shape]` where the input has no time.
        lengths: `[rows]` uint32 time steps, or None: one each.
        form: how they were given.
        rows: how many rows.
    """

    fields: Sequence[Field]
    columns: Sequence[bytes]
    lengths: Lengths | None
    form: Form
    rows: int

    @property
    def time_steps(self) -> int:
        """Of all rows together."""
        return self.rows if self.lengths is None else int(self.lengths.sum(dtype=np.int64))

    @property
    def starts(self) -> NDArray[np.int64]:
        """`[rows + 1]`: where each row's time steps begin, and where the last one's end."""
        if self.lengths is None:
            return np.arange(self.rows + 1)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])


def prepare_batch(signature: Signature, given: Any, rows: int) -> Batch:
    """Checks one step of `rows` sessions.

    Args:
        signature: the model's.
        given: in one of the forms of `Form`, or a dict of them by name where the model has several inputs.
        rows: how many sessions it is for.

    Raises:
        InvalidInput: a name, shape, dtype or number of rows or time steps that does not fit.
    """
    if len(signature.inputs) == 1 and isinstance(given, np.ndarray):
        (field,) = signature.inputs
        if given.dtype == field.dtype and given.shape == (rows, *field.shape):
            # What nearly every step is: nothing to name, cast or agree upon.
            return Batch(signature.inputs, (given.tobytes(),), None, Form.ONE, rows)
    columns: list[Array] = []
    form, lengths = Form.ONE, None
    first = True
    for field, value in zip(signature.inputs, signature.by_name(given), strict=True):
        if not field.has_time:
            columns.append(_rows_of(field, field.cast(value), rows, []))
            continue
        column, its_form, its_lengths = _timed(field, value, rows)
        if not first and (its_form is not form or not np.array_equal(_or_ones(its_lengths), _or_ones(lengths))):
            raise field.refuse(
                e.ERROR_REASON_INPUT_SHAPE, "the other inputs' form and time steps", f"{its_form.name.lower()}"
            )
        form, lengths, first = its_form, its_lengths, False
        columns.append(column)
    return Batch(signature.inputs, [column.tobytes() for column in columns], lengths, form, rows)


def _timed(field: Field, value: Any, rows: int) -> tuple[Array, Form, Lengths | None]:
    """One input's column, the form that it came in, and its rows' time steps."""
    if isinstance(value, tuple):
        if len(value) != 2:
            raise field.refuse(e.ERROR_REASON_INPUT_SHAPE, "a tuple of (data, lengths)", f"{len(value)} items")
        lengths = _lengths(field, np.asarray(value[1]), rows)
        data = _rows_of(field, field.cast(value[0]), int(lengths.sum(dtype=np.int64)), [])
        return data, Form.PACKED, lengths
    rank = len(field.shape)
    if isinstance(value, list) and value and all(_rank(item) == rank + 1 for item in value):
        parts = [field.cast(item) for item in value]
        lengths = _lengths(field, np.array([len(part) for part in parts]), rows)
        for part in parts:
            _rows_of(field, part, len(part), [])
        return np.concatenate(parts), Form.LIST, lengths
    array = field.cast(value)
    if array.ndim == rank + 2:
        time_steps = array.shape[1]
        _rows_of(field, array, rows, [time_steps])
        lengths = _lengths(field, np.full(rows, time_steps), rows)
        return array.reshape(rows * time_steps, *field.shape), Form.CHUNK, lengths
    return _rows_of(field, array, rows, []), Form.ONE, None


def _rank(item: Any) -> int:
    try:
        return np.ndim(item)
    except ValueError:  # uneven lists: the cast says so better
        return -1


def _rows_of(field: Field, array: Array, rows: int, between: list[int]) -> Array:
    if array.shape != (rows, *between, *field.shape):
        expected = field.describe(axes=[str(rows), *map(str, between)])
        if field.has_time:
            expected += f", {field.describe(axes=[str(rows), 'time'])} or a list of {field.describe(axes=['time'])}"
        raise field.refuse(e.ERROR_REASON_INPUT_SHAPE, expected, f"shape {list(array.shape)}")
    return array


def _lengths(field: Field, given: NDArray[Any], rows: int) -> Lengths:
    if given.shape != (rows,) or given.dtype.kind not in "iu":
        raise field.refuse(e.ERROR_REASON_INPUT_SHAPE, f"{rows} lengths", f"{given.dtype} {list(given.shape)}")
    if rows and int(given.min()) < 1:
        row = int(np.argmin(given))
        raise field.refuse(e.ERROR_REASON_INPUT_EMPTY, "at least one time step a row", f"none at {row}")
    return given.astype(np.uint32)


def _or_ones(lengths: Lengths | None) -> Any:
    return 1 if lengths is None else lengths


@dataclass(frozen=True, slots=True)
class Piece:
    """Answered rows of one batch, as a frame brought them.

    Attributes:
        positions: which rows of the batch; ALL: every one, and the frame has these and no others, in their order.
        picked: which rows of the frame they are.
        lengths: of all the frame's rows, or None: one each.
        columns: the frame's, per output.
    """

    positions: Picked
    picked: Picked
    lengths: Lengths | None
    columns: Sequence[bytes]


def present_batch(signature: Signature, batch: Batch, pieces: Sequence[Piece]) -> Outputs:
    """The answers in the form of the input: writable; zeros where no piece has the row.

    Raises:
        ProtocolError: the server's columns do not fit its own description of the model, or what was asked.
    """
    try:
        arrays = [_output(field, batch, pieces, index) for index, field in enumerate(signature.outputs)]
    except (IndexError, ValueError) as error:
        raise ProtocolError(f"a result frame does not fit model {signature.model!r}: {error}") from error
    return signature.named(arrays)


def _output(field: Field, batch: Batch, pieces: Sequence[Piece], index: int) -> Any:
    if len(pieces) == 1 and isinstance(pieces[0].positions, slice):
        data = _whole(field, batch, pieces[0], index)
    else:
        data = _joined(field, batch, pieces, index)
    if not field.has_time or batch.form is Form.ONE:
        return data
    if batch.form is Form.CHUNK:
        return data.reshape(batch.rows, -1, *field.shape)
    starts = batch.starts
    if batch.form is Form.PACKED:
        return data, np.diff(starts)
    return [part.copy() for part in np.split(data, starts[1:-1])]


def _whole(field: Field, batch: Batch, piece: Piece, index: int) -> Array:
    """An output that came in one piece."""
    values = np.frombuffer(piece.columns[index], field.dtype)
    count = batch.time_steps if field.has_time else batch.rows
    lengths, asked = piece.lengths, batch.lengths
    if lengths is not asked and not bool(np.all(_or_ones(lengths) == _or_ones(asked))):
        raise ValueError("its rows are not as long as the steps that it answers")
    return values.reshape(count, *field.shape).copy()


def _joined(field: Field, batch: Batch, pieces: Sequence[Piece], index: int) -> Array:
    """An output that came in several pieces; zeros where none has the row."""
    starts = batch.starts if field.has_time else np.arange(batch.rows + 1)
    data = np.zeros((int(starts[-1]), *field.shape), field.dtype)
    for piece in pieces:
        lengths = piece.lengths if field.has_time else None
        values = np.frombuffer(piece.columns[index], field.dtype).reshape(-1, *field.shape)
        if lengths is None and batch.lengths is None:
            data[piece.positions] = values[piece.picked]
        else:
            data[_spread(starts, piece.positions)] = values[_spread(_starts_of(lengths, values), piece.picked)]
    return data


def _starts_of(lengths: Lengths | None, values: Array) -> NDArray[np.int64]:
    if lengths is None:
        return np.arange(len(values) + 1)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _spread(starts: NDArray[np.int64], rows: Picked) -> NDArray[np.int64]:
    """Indices of all time steps of `rows`, one row after the other."""
    first = starts[:-1][rows]
    counts = starts[1:][rows] - first
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0)


def pick_rows(batch: Batch, positions: Picked) -> tuple[Sequence[bytes], bytes]:
    """Columns and lengths, as bytes, of some rows of a batch: what a StepFrame carries."""
    if isinstance(positions, slice):
        return batch.columns, b"" if batch.lengths is None else batch.lengths.tobytes()
    columns: list[bytes] = []
    for field, data in zip(batch.fields, batch.columns, strict=True):
        column = np.frombuffer(data, field.dtype).reshape(-1, *field.shape)
        spread = field.has_time and batch.lengths is not None
        columns.append(column[_spread(batch.starts, positions) if spread else positions].tobytes())
    return columns, b"" if batch.lengths is None else batch.lengths[positions].tobytes()


def take_rows(batch: Batch, positions: NDArray[np.intp]) -> Batch:
    """Some rows of a batch, as a batch of their own."""
    columns, _ = pick_rows(batch, positions)
    lengths = None if batch.lengths is None else batch.lengths[positions]
    return Batch(batch.fields, columns, lengths, batch.form, len(positions))
