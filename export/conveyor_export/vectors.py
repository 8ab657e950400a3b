"""Verifier vectors: a few small runs of the module in PyTorch that go into the file with the model.

Invariant: they are the same for the same module, and small whatever the model's size: sequences are cut and large
tensors are known by some of their elements.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2, vectors_pb2
from conveyor_proto.vectors import (
    MAX_BYTES,
    MAX_RUN_BYTES,
    VECTORS_VERSION,
    VectorsError,
    check_vectors,
    expected,
    run_bytes,
)

from conveyor_export.errors import ExportError
from conveyor_export.step_model import StepModel
from conveyor_export.verify_inputs import Sample, given_sample, random_sample, resampled
from conveyor_export.verify_truth import Truth

# Of each vector: random rows, then the example's first. Of different lengths: a server runs them as a ragged batch.
TIME_STEPS = (12, 5, 1, 8)
# Another processor or device rounds otherwise than the one that verified: so much of the largest value, or of 1.
ROUNDING = 1e-5


def make_vectors(model: StepModel, *, tolerance: float, seed: int = 0) -> vectors_pb2.VerifierVectors | None:
    """Asks PyTorch; None where one time step of the model's inputs alone is too large.

    Args:
        model: what capture made and the verifier passed.
        tolerance: what the verifier allowed.
        seed: of the random inputs.

    Raises:
        ExportError: the module gives other values than its description says, which the verifier would have found.
    """
    rows = _fitting(model, _rows(model, seed))
    if not rows:
        return None
    inputs = [[_cut(row, item, time) for item in model.spec.inputs] for row, time in rows]
    left = MAX_BYTES - sum(array.nbytes for arrays in inputs for array in arrays)
    # Some of every few elements may be one more than that.
    share = left // (len(rows) * (len(model.spec.outputs) + len(model.spec.states))) - 8
    vectors = vectors_pb2.VerifierVectors(vectors_version=VECTORS_VERSION)
    for arrays, (row, time) in zip(inputs, rows, strict=True):
        truth, index = row
        vectors.vectors.add(
            time_steps=time,
            inputs=[_little(array) for array in arrays],
            outputs=[_expected(truth.output(item.name, index, time), share, tolerance) for item in model.spec.outputs],
            states=[_expected(truth.state(item.name, index, time), share, tolerance) for item in model.spec.states],
        )
    try:
        check_vectors(vectors, model.spec)
    except VectorsError as error:
        raise ExportError(f"the verifier vectors contradict the model's description: {error}") from error
    return vectors


def _rows(model: StepModel, seed: int) -> list[tuple[tuple[Truth, int], int]]:
    """(truth, row) and how many time steps of it."""
    rng = np.random.default_rng(seed)
    example = Truth(model, given_sample(model.spec, "example", model.example), single=True)
    random = Truth(model, random_sample(model, rng), single=True)
    if not random.finite() and example.finite():
        random = Truth(model, resampled(model, random.sample, rng), single=True)
    sources = [(random, 0), (random, 1), (random, 2), (example, 0)]
    return [(source, min(time, source[0].sample.time)) for source, time in zip(sources, TIME_STEPS, strict=True)]


def _fitting(model: StepModel, rows: Sequence[tuple[tuple[Truth, int], int]]) -> list[tuple[tuple[Truth, int], int]]:
    """As many and as long as leaves half of the room to what is expected."""

    def fits(chosen: Sequence[tuple[tuple[Truth, int], int]]) -> bool:
        size = sum(_cut(row, item, time).nbytes for row, time in chosen for item in model.spec.inputs)
        return size <= MAX_BYTES // 2 and all(run_bytes(model.spec, time) <= MAX_RUN_BYTES for _, time in chosen)

    chosen = list(rows)
    while chosen and not fits(chosen):
        if max(time for _, time in chosen) > 1:
            chosen = [(row, max(1, time // 2)) for row, time in chosen]
        else:
            chosen.pop()
    return chosen


def _cut(row: tuple[Truth, int], item: spec_pb2.TensorSpec, time: int) -> Array:
    truth, index = row
    sample: Sample = truth.sample
    array: Array = sample.inputs[item.name][index]
    return np.asarray(array[:time] if item.has_time else array, to_numpy_dtype(item.dtype))


def _little(array: Array) -> bytes:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _expected(array: Array, share: int, tolerance: float) -> vectors_pb2.ExpectedTensor:
    every = max(1, -(-array.nbytes // share))
    # Odd, so that it goes through all columns of a table with an even number of them.
    every += every > 1 and every % 2 == 0
    room = 0.0
    if np.issubdtype(array.dtype, np.floating):
        finite = np.abs(array[np.isfinite(array)].astype(np.float64))
        room = ROUNDING * max(1.0, float(finite.max(initial=0.0)))
    return expected(array, every, max(tolerance, room))
