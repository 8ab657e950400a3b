"""Answers as the bytes of messages, many at once.

Invariant: what is written here is what protobuf would write for the same StepResult or ResultFrame, byte for byte: the
template of a result is protobuf's own, and only its numbers and data are filled in.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from conveyor_proto.codec import Array, encode, to_numpy_dtype
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2
from numpy.typing import NDArray

# Larger result frames are split, so that one never nears a client's message limit (4 MiB unless it says otherwise).
MAX_FRAME_BYTES = 1 << 20
# Of a durable_seq, a fixed64: whatever it is.
DURABLE_BYTES = 8
# From each of these on, a varint takes a byte more.
_VARINT_BOUNDS = np.array([1 << (7 * size) for size in range(1, 9)], np.int64)
_FRAME_TAG = b"\x1a"
_LABEL_TAGS = (0x08, 0x10)
_HANDLES_TAG, _SEQS_TAG, _LENGTHS_TAG, _COLUMN_TAG, _DURABLE_TAG = b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x32"


class ResultWriter:
    """Writes StepResults of one model. Core thread only.

    Args:
        outputs: ModelSpec.outputs.
        says_durable: each result says its session's durable_seq; else what is given of it is not written.
    """

    def __init__(self, outputs: Sequence[spec_pb2.TensorSpec], *, says_durable: bool = False) -> None:
        self._outputs = outputs
        self._says_durable = says_durable
        self._templates: dict[tuple[int, int, int], _Template] = {}
        self._first_timed = next((index for index, item in enumerate(outputs) if item.has_time), None)

    def write(
        self,
        handles: NDArray[np.int64],
        seqs: NDArray[np.int64],
        outputs: Sequence[Array],
        durable: NDArray[np.int64] | None = None,
    ) -> list[bytes]:
        """A StreamResponse for each row.

        Args:
            handles: of the sessions, `[rows]`.
            seqs: of the steps, `[rows]`.
            outputs: `[rows, time, *shape]`, or `[rows, *shape]` without time.
            durable: the sessions' durable_seqs `[rows]`; None: 0 for all.
        """
        handle_sizes = np.where(handles == 0, 0, _varint_sizes(handles))
        seq_sizes = _varint_sizes(seqs)
        forms = handle_sizes * 16 + seq_sizes
        form = int(forms[0])
        if (forms == form).all():
            return self._write(form, handles, seqs, outputs, durable)
        messages = [b""] * len(handles)
        for form in np.unique(forms).tolist():
            rows = np.flatnonzero(forms == form)
            durable_there = None if durable is None else durable[rows]
            written = self._write(form, handles[rows], seqs[rows], [array[rows] for array in outputs], durable_there)
            for row, message in zip(rows.tolist(), written, strict=True):
                messages[row] = message
        return messages

    def write_labelled(
        self,
        labels: NDArray[np.uint8],
        sizes: tuple[int, int],
        outputs: Sequence[Array],
        durable: NDArray[np.int64] | None = None,
    ) -> list[bytes]:
        """As `write`, for handles and seqs that are there as bytes, tags included: `[rows, bytes]`.

        Args:
            labels: as of StepLayout.labels; no number takes more bytes than it needs.
            sizes: bytes of each handle and each seq.
            outputs: as of `write`.
            durable: as of `write`.
        """
        return self._template(*sizes, [array[0] for array in outputs]).fill(labels, outputs, durable)

    def write_one(self, handle: int, seq: int, outputs: Sequence[Array], durable_seq: int = 0) -> bytes:
        """A StreamResponse for one row: outputs are `[time, *shape]`, or `[*shape]` without time."""
        sizes = len(_varint(handle)) if handle else 0, len(_varint(seq))
        return self._template(*sizes, outputs).fill_one(handle, seq, outputs, durable_seq)

    def shape(self, sizes: tuple[int, int], length: int) -> tuple[bytes, int, list[int], int]:
        """A StreamResponse of one row.

        Args:
            sizes: bytes of the handle and of the seq.
            length: time steps.

        Returns:
            Its bytes; where handle and seq begin with their tags; where each output's data begins; and where the eight
            bytes of the durable_seq do, -1 where it is not said.
        """
        like = [
            np.zeros((length, *item.shape) if item.has_time else (*item.shape,), to_numpy_dtype(item.dtype))
            for item in self._outputs
        ]
        return self._template(*sizes, like).shape

    def _write(
        self,
        form: int,
        handles: NDArray[np.int64],
        seqs: NDArray[np.int64],
        outputs: Sequence[Array],
        durable: NDArray[np.int64] | None,
    ) -> list[bytes]:
        sizes = divmod(form, 16)
        return self.write_labelled(_labels(handles, seqs, *sizes), sizes, outputs, durable)

    def _template(self, handle_size: int, seq_size: int, like: Sequence[Array]) -> "_Template":
        length = len(like[self._first_timed]) if self._first_timed is not None else 1
        key = (handle_size, seq_size, length)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) > _MOST_TEMPLATES:
                self._templates.clear()
            zeros = [np.zeros_like(array) for array in like]
            tensors = [encode(array, item.name) for array, item in zip(zeros, self._outputs, strict=True)]
            template = self._templates[key] = _Template(handle_size, seq_size, tensors, says_durable=self._says_durable)
        return template


# Chunks come in many lengths.
_MOST_TEMPLATES = 256


class _Template:
    """A StepResult with handle and seq of so many bytes, whose data is zeros."""

    def __init__(
        self, handle_size: int, seq_size: int, outputs: Sequence[tensor_pb2.Tensor], *, says_durable: bool
    ) -> None:
        handle, seq = (1 << (7 * (size - 1)) if size else 0 for size in (handle_size, seq_size))
        durable_seq = 0 if says_durable else None
        result = session_pb2.StepResult(handle=handle, seq=seq, outputs=outputs, durable_seq=durable_seq)
        message = session_pb2.StreamResponse(result=result).SerializeToString()
        self._bytes = np.frombuffer(message, np.uint8)
        # The result is the message's end, and its fields come in the order of their numbers.
        at = len(message) - len(result.SerializeToString())
        self._handle = _after_tag(at, handle_size)
        self._label = slice(at, at)
        at += 1 + handle_size if handle_size else 0
        self._seq = _after_tag(at, seq_size)
        at += 1 + seq_size
        self._label = slice(self._label.start, at)
        self._data: list[slice] = []
        for tensor in result.outputs:
            body = tensor.ByteSize()
            at += 1 + len(_varint(body)) + body
            # `data` is the tensor's last field.
            self._data.append(slice(at - len(tensor.data), at))
        # The last field of all, where it is said.
        self._durable = slice(len(message) - DURABLE_BYTES, len(message)) if says_durable else None
        spans = [self._handle, self._seq, *self._data, *([] if self._durable is None else [self._durable])]
        stops = [0, *(span.stop for span in spans)]
        self._between = [message[stop : span.start] for stop, span in zip(stops, spans, strict=False)]

    @property
    def shape(self) -> tuple[bytes, int, list[int], int]:
        durable_at = -1 if self._durable is None else self._durable.start
        return self._bytes.tobytes(), self._label.start, [data.start for data in self._data], durable_at

    def fill_one(self, handle: int, seq: int, outputs: Sequence[Array], durable_seq: int) -> bytes:
        numbers = [_varint(handle) if self._handle.start < self._handle.stop else b"", _varint(seq)]
        fields = [*numbers, *(array.tobytes() for array in outputs)]
        if self._durable is not None:
            fields.append(durable_seq.to_bytes(DURABLE_BYTES, "little"))
        return b"".join([part for pair in zip(self._between, fields, strict=True) for part in pair])

    def fill(
        self, labels: NDArray[np.uint8], outputs: Sequence[Array], durable: NDArray[np.int64] | None
    ) -> list[bytes]:
        count, size = len(labels), len(self._bytes)
        messages = np.empty((count, size), np.uint8)
        messages[:] = self._bytes
        messages[:, self._label] = labels
        for columns, array in zip(self._data, outputs, strict=True):
            messages[:, columns] = np.ascontiguousarray(array).reshape(count, -1).view(np.uint8)
        if self._durable is not None and durable is not None:
            messages[:, self._durable] = np.ascontiguousarray(durable).reshape(count, 1).view(np.uint8)
        data = messages.tobytes()
        return [data[start : start + size] for start in range(0, count * size, size)]


def write_frames(
    handles: NDArray[np.int64],
    seqs: NDArray[np.int64],
    length: int,
    outputs: Sequence[Array],
    durable: NDArray[np.int64] | None = None,
) -> Iterator[bytes]:
    """StreamResponses with the rows in ResultFrames.

    Args:
        handles: of the sessions, `[rows]`.
        seqs: of the steps, `[rows]`.
        length: time steps of each row.
        outputs: as of ResultWriter.write.
        durable: the sessions' durable_seqs `[rows]`; None: they are not said.
    """
    row_bytes = max(1, sum(array[0].nbytes for array in outputs) + (0 if durable is None else DURABLE_BYTES))
    rows = max(1, MAX_FRAME_BYTES // row_bytes)
    for start in range(0, len(handles), rows):
        part = slice(start, start + rows)
        durable_there = None if durable is None else durable[part]
        yield _frame(handles[part], seqs[part], length, [array[part] for array in outputs], durable_there)


def _frame(
    handles: NDArray[np.int64],
    seqs: NDArray[np.int64],
    length: int,
    outputs: Sequence[Array],
    durable: NDArray[np.int64] | None,
) -> bytes:
    fields: list[bytes | memoryview] = []
    size = 0
    columns: list[tuple[bytes, Array]] = [(_HANDLES_TAG, handles.astype(np.uint32)), (_SEQS_TAG, seqs)]
    if length > 1:
        columns.append((_LENGTHS_TAG, np.full(len(handles), length, np.uint32)))
    columns += [(_COLUMN_TAG, array) for array in outputs]
    if durable is not None:
        columns.append((_DURABLE_TAG, durable))
    for tag, array in columns:
        head = tag + _varint(array.nbytes)
        fields += [head, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data]
        size += len(head) + array.nbytes
    return b"".join([_FRAME_TAG, _varint(size), *fields])


def _varint_sizes(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(_VARINT_BOUNDS, values, side="right").astype(np.int64) + 1


def _labels(handles: NDArray[np.int64], seqs: NDArray[np.int64], *sizes: int) -> NDArray[np.uint8]:
    """Handles and seqs that take so many bytes, with the tags of StepResult: `[rows, bytes]`."""
    columns: list[NDArray[np.int64]] = []
    for tag, size, values in zip(_LABEL_TAGS, sizes, (handles, seqs), strict=True):
        if size:
            columns.append(np.full(len(values), tag))
            columns += [(values >> (7 * turn)) & 0x7F | (0x80 if turn + 1 < size else 0) for turn in range(size)]
    return np.stack(columns, axis=1).astype(np.uint8)


def _after_tag(at: int, size: int) -> slice:
    return slice(at + 1, at + 1 + size) if size else slice(at, at)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
