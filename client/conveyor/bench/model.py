"""What a step of a model takes, as bytes: asked from the server once, filled with random values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import model_pb2, spec_pb2
from conveyor_proto.v1.model_pb2_grpc import ModelServiceStub
from numpy.typing import NDArray

from conveyor.bench.spec import LoadError, LoadSpec

# Beyond so much random data, sessions send the same values as others: the model's cost does not depend on them.
_MAX_POOL_BYTES = 64 << 20


def inputs_of(target: str, spec: LoadSpec, timeout_s: float = 10.0) -> list[spec_pb2.TensorSpec]:
    """Asks a server for the inputs of a load's model.

    Raises:
        LoadError: no answer, or no such model.
    """
    if spec.root_certificates is None:
        channel = grpc.insecure_channel(target)
    else:
        credentials = grpc.ssl_channel_credentials(spec.root_certificates.read_bytes())
        channel = grpc.secure_channel(target, credentials)
    with channel:
        stub: Any = ModelServiceStub(channel)
        try:
            request = model_pb2.GetModelRequest(name=spec.model, version=spec.version)
            answer = stub.GetModel(request, timeout=timeout_s, metadata=spec.metadata)
        except grpc.RpcError as error:
            details: Any = error
            raise LoadError(f"{target}, model {spec.model}: {details.details()}", code=details.code()) from None
    return list(answer.model.spec.inputs)


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one input for every step that is sent.

    Attributes:
        has_time: the value of a step is `[time steps, *shape]`, else `[*shape]`.
        data: bytes of one step's value, `[pool, bytes]`; session i sends row i % pool.
    """

    has_time: bool
    data: NDArray[np.uint8]


def random_columns(inputs: Sequence[spec_pb2.TensorSpec], spec: LoadSpec, rng: np.random.Generator) -> list[Column]:
    """Random values for each input: standard normal, or whole numbers, or truth values, as its dtype is."""
    time_steps = spec.time_steps
    row_bytes = sum(
        math.prod(item.shape) * to_numpy_dtype(item.dtype).itemsize * (time_steps if item.has_time else 1)
        for item in inputs
    )
    pool = max(1, min(spec.sessions, _MAX_POOL_BYTES // max(1, row_bytes)))
    return [_column(item, spec, pool, rng) for item in inputs]


def _column(item: spec_pb2.TensorSpec, spec: LoadSpec, pool: int, rng: np.random.Generator) -> Column:
    dtype = to_numpy_dtype(item.dtype)
    shape = (pool, *([spec.time_steps] if item.has_time else []), *item.shape)
    values: NDArray[Any]
    if np.issubdtype(dtype, np.floating):
        values = rng.standard_normal(shape, np.float32).astype(dtype)
    else:
        values = rng.integers(0, spec.integers_below, shape).astype(dtype)
    return Column(item.has_time, np.ascontiguousarray(values).reshape(pool, -1).view(np.uint8).reshape(pool, -1))
