"""Whether a model computes here what it was verified to compute: its file's own vectors, run on this device.

Invariant: a model passes only when every vector gives every output and every state within the tolerance that the file
records for it, run as sessions are: as ragged batches, in two parts with the state carried from one to the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2, vectors_pb2
from conveyor_proto.vectors import difference

from conveyor_server.repository.policy import Bounds
from conveyor_server.runner.base import Run, Runner


@dataclass(frozen=True, slots=True)
class Miss:
    """A tensor that is not what it should be.

    Attributes:
        tensor: output or state name.
        vector: number of the vector, from 1.
        difference: the largest absolute one; infinite where a value is NaN.
        tolerance: what was allowed.
    """

    tensor: str
    vector: int
    difference: float
    tolerance: float

    def __str__(self) -> str:
        """One clause, for the refusal."""
        return (
            f"{self.tensor!r} differs by {self.difference:.3g} from what PyTorch gave (verifier vector {self.vector}), "
            f"and {self.tolerance:.3g} is allowed"
        )


class NotAsVerified(Exception):  # noqa: N818 - it says what is so
    """A model does not give here what its file says that PyTorch gave.

    Attributes:
        miss: the tensor that is furthest off, by its tolerance.
    """

    def __init__(self, miss: Miss) -> None:
        super().__init__(str(miss))
        self.miss = miss


def check(runner: Runner) -> int:
    """Runs the vectors of a runner that no session is on, and returns how many there are. Any thread; blocks.

    Raises:
        NotAsVerified: a tensor differs by more than is allowed.
        RunFailed: a run failed.
    """
    if runner.vectors is None:
        return 0
    vectors = list(runner.vectors.vectors)
    bounds = Bounds.of(runner.spec)
    # Half of the slots are read while the other half is written.
    rows = max(1, min(len(vectors), bounds.rows or len(vectors), runner.capacity // 2))
    misses = [
        miss
        for first in range(0, len(vectors), rows)
        for miss in _misses(runner, vectors[first : first + rows], bounds.time_steps, first + 1)
    ]
    if misses:
        raise NotAsVerified(max(misses, key=lambda miss: miss.difference / max(miss.tolerance, 1e-300)))
    return len(vectors)


def _misses(
    runner: Runner, vectors: Sequence[vectors_pb2.VerifierVector], most_steps: int | None, number: int
) -> Iterator[Miss]:
    spec = runner.spec
    outputs, slots = _played(runner, vectors, most_steps)
    states = runner.read_rows(slots)
    for row, vector in enumerate(vectors):
        got = [*outputs[row], *(state[row] for state in states)]
        told = [*vector.outputs, *vector.states]
        names = [*(item.name for item in spec.outputs), *(item.name for item in spec.states)]
        for name, item, array in zip(names, told, got, strict=True):
            apart = difference(item, array)
            if apart > item.tolerance:
                yield Miss(name, number + row, apart, item.tolerance)


def _played(
    runner: Runner, vectors: Sequence[vectors_pb2.VerifierVector], most_steps: int | None
) -> tuple[list[list[Array]], list[int]]:
    """Each vector's outputs, whole, and the slots that hold the states at the end."""
    spec = runner.spec
    count = len(vectors)
    inputs = [_inputs(spec, vector) for vector in vectors]
    ends = np.array([vector.time_steps for vector in vectors])
    pieces: list[list[list[Array]]] = [[[] for _ in spec.outputs] for _ in vectors]
    # Each row's slot now, and the one that its next run writes to.
    now, then = np.arange(count), np.arange(count) + count
    done = np.zeros(count, np.int64)
    half = -(-ends // 2)
    while (done < ends).any():
        lengths = np.minimum(half if most_steps is None else np.minimum(half, most_steps), ends - done)
        live = np.flatnonzero(lengths)
        result = runner.step(
            Run(
                sources=now[live].astype(np.int64),
                destinations=then[live].astype(np.int64),
                fresh=done[live] == 0,
                lengths=lengths[live].astype(np.int32),
                inputs=_padded(spec, [inputs[row] for row in live], done[live], lengths[live]),
            )
        )
        for index, row in enumerate(live):
            for kept, array, item in zip(pieces[row], result.outputs, spec.outputs, strict=True):
                kept.append(array[index, : lengths[row]] if item.has_time else array[index])
        now[live], then[live] = then[live], now[live]
        done += lengths
    whole = [
        [np.concatenate(kept) if item.has_time else kept[-1] for kept, item in zip(row, spec.outputs, strict=True)]
        for row in pieces
    ]
    return whole, now.tolist()


def _inputs(spec: spec_pb2.ModelSpec, vector: vectors_pb2.VerifierVector) -> list[Array]:
    arrays: list[Array] = []
    for item, given in zip(spec.inputs, vector.inputs, strict=True):
        dtype = to_numpy_dtype(item.dtype)
        shape = (vector.time_steps, *item.shape) if item.has_time else tuple(item.shape)
        arrays.append(np.frombuffer(given, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape))
    return arrays


def _padded(spec: spec_pb2.ModelSpec, rows: Sequence[Sequence[Array]], starts: Array, lengths: Array) -> list[Array]:
    """The rows' next time steps as the inputs of a run; zeros beyond each row's length."""
    arrays: list[Array] = []
    for index, item in enumerate(spec.inputs):
        lead = (len(rows), int(lengths.max())) if item.has_time else (len(rows),)
        array = np.zeros((*lead, *item.shape), to_numpy_dtype(item.dtype))
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            if item.has_time:
                array[row, :length] = rows[row][index][start : start + length]
            else:
                array[row] = rows[row][index]
        arrays.append(array)
    return arrays
