"""Verifier vectors in a file: the JSON that the ONNX metadata holds, and its bounds.

Invariant: what is read fits its ModelSpec, tensor by tensor, and is bounded before anything is made of it; so running
it can neither surprise a model nor allocate much.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2, tensor_pb2, vectors_pb2

# Key in ONNX metadata_props.
METADATA_KEY = "conveyor.vectors"
VECTORS_VERSION = 1
# All tensors of all vectors together, as bytes; and as JSON, in characters.
MAX_BYTES = 64 << 10
MAX_TEXT = 4 * MAX_BYTES
MAX_VECTORS = 8
MAX_TIME_STEPS = 64
# Outputs that one vector's run gives, compared or not.
MAX_RUN_BYTES = 16 << 20

_DataType: TypeAlias = tensor_pb2.DataType.ValueType


class VectorsError(ValueError):
    """Verifier vectors that cannot be read, or not with this model; the message says what is wrong."""


def dump_vectors(vectors: vectors_pb2.VerifierVectors) -> str:
    """The JSON text that goes into the file: proto field names."""
    return json_format.MessageToJson(vectors, preserving_proto_field_name=True, indent=None)


def parse_vectors(text: str, spec: spec_pb2.ModelSpec) -> vectors_pb2.VerifierVectors:
    """Reads and checks the JSON that `dump_vectors` wrote.

    Raises:
        VectorsError: not JSON of VerifierVectors, another version, or not of the model's tensors; or more than allowed.
    """
    if len(text) > MAX_TEXT:
        raise VectorsError(f"metadata {METADATA_KEY} has more than {MAX_TEXT} characters")
    try:
        vectors = json_format.Parse(text, vectors_pb2.VerifierVectors())
    except (json_format.ParseError, RecursionError) as error:
        raise VectorsError(f"metadata {METADATA_KEY} is no VerifierVectors: {error}") from error
    check_vectors(vectors, spec)
    return vectors


def check_vectors(vectors: vectors_pb2.VerifierVectors, spec: spec_pb2.ModelSpec) -> None:
    """Raises VectorsError where vectors are not of a model whose spec is sound, or are more than allowed."""
    if vectors.vectors_version != VECTORS_VERSION:
        raise VectorsError(
            f"vectors_version {vectors.vectors_version} is not {VECTORS_VERSION}: export the model again"
        )
    if not 1 <= len(vectors.vectors) <= MAX_VECTORS:
        raise VectorsError(f"{len(vectors.vectors)} verifier vectors, where 1 to {MAX_VECTORS} are allowed")
    for number, vector in enumerate(vectors.vectors, 1):
        try:
            _check(vector, spec)
        except VectorsError as error:
            raise VectorsError(f"verifier vector {number}: {error}") from None
    size = vectors_bytes(vectors)
    if size > MAX_BYTES:
        raise VectorsError(f"the verifier vectors have {size} bytes, more than {MAX_BYTES}")


def vectors_bytes(vectors: vectors_pb2.VerifierVectors) -> int:
    """Bytes of all tensors together."""
    return sum(
        sum(map(len, vector.inputs)) + sum(len(item.values) for item in (*vector.outputs, *vector.states))
        for vector in vectors.vectors
    )


def run_bytes(spec: spec_pb2.ModelSpec, time_steps: int) -> int:
    """Bytes of the outputs of one row's run."""
    return sum(_count(item, time_steps) * to_numpy_dtype(item.dtype).itemsize for item in spec.outputs)


def expected(array: Array, every: int, tolerance: float) -> vectors_pb2.ExpectedTensor:
    """What is written of a tensor that PyTorch gave."""
    picked = np.ascontiguousarray(array).reshape(-1)[::every]
    little = picked.astype(picked.dtype.newbyteorder("<"), copy=False)
    return vectors_pb2.ExpectedTensor(every=every, values=little.tobytes(), tolerance=tolerance)


def difference(item: vectors_pb2.ExpectedTensor, got: Array) -> float:
    """The largest absolute difference of a tensor of the model from what was expected of it; NaN anywhere: infinite."""
    left = np.frombuffer(item.values, got.dtype.newbyteorder("<")).astype(np.float64)
    right = got.reshape(-1)[:: item.every].astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart: NDArray[np.float64] = np.where(left == right, 0.0, np.abs(left - right))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def _check(vector: vectors_pb2.VerifierVector, spec: spec_pb2.ModelSpec) -> None:
    if not 1 <= vector.time_steps <= MAX_TIME_STEPS:
        raise VectorsError(f"{vector.time_steps} time steps, where 1 to {MAX_TIME_STEPS} are allowed")
    if run_bytes(spec, vector.time_steps) > MAX_RUN_BYTES:
        raise VectorsError(f"{vector.time_steps} time steps give outputs of more than {MAX_RUN_BYTES} bytes")
    kinds: tuple[tuple[str, Sequence[object], Sequence[object]], ...] = (
        ("inputs", vector.inputs, spec.inputs),
        ("outputs", vector.outputs, spec.outputs),
        ("states", vector.states, spec.states),
    )
    for what, found, wanted in kinds:
        if len(found) != len(wanted):
            raise VectorsError(f"{len(found)} {what}, and the model has {len(wanted)}")
    for given, item in zip(vector.inputs, spec.inputs, strict=True):
        _check_size(item.name, len(given), _count(item, vector.time_steps), item.dtype)
    for told, output in zip(vector.outputs, spec.outputs, strict=True):
        _check_expected(output.name, told, _count(output, vector.time_steps), output.dtype)
    for told, state in zip(vector.states, spec.states, strict=True):
        _check_expected(state.name, told, math.prod(state.shape), state.dtype)


def _check_expected(name: str, item: vectors_pb2.ExpectedTensor, count: int, dtype: _DataType) -> None:
    if item.every < 1:
        raise VectorsError(f"{name!r} says no `every`")
    if not 0 <= item.tolerance < math.inf:
        raise VectorsError(f"{name!r} has tolerance {item.tolerance}, which is no number of at least 0")
    _check_size(name, len(item.values), -(-count // item.every), dtype)


def _check_size(name: str, size: int, count: int, dtype: _DataType) -> None:
    wanted = count * to_numpy_dtype(dtype).itemsize
    if size != wanted:
        raise VectorsError(f"{name!r} has {size} bytes, where {wanted} are expected")


def _count(item: spec_pb2.TensorSpec, time_steps: int) -> int:
    """Elements of one row."""
    return math.prod(item.shape) * (time_steps if item.has_time else 1)
