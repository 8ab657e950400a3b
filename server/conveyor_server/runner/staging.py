"""Buffers of a run as the compiled turn fills them: plain bytes, row by row.

Invariant: the arrays stay where they are as long as the staging lives, which holds them.
"""

import math
from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server import compiled


def can_be_staged(spec: spec_pb2.ModelSpec) -> bool:
    """The compiled part is there, and takes models of so many tensors."""
    tensors = (*spec.inputs, *spec.outputs)
    few = max(len(spec.inputs), len(spec.outputs)) <= compiled.MOST_TENSORS if compiled.BUILT else False
    return few and all(time_step_bytes(item) > 0 for item in tensors)


def stage(
    spec: spec_pb2.ModelSpec,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    control: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]],
    finite: NDArray[np.bool_] | None,
    *,
    initial_slot: int,
    frame: object,
) -> "compiled.Staging":
    """A staging over these arrays, C order, of one time step; `can_be_staged` must hold.

    Args:
        spec: the model's.
        inputs: `[rows or more, time, *shape]`, or `[rows or more, *shape]` without time.
        outputs: `[rows or more, time, *shape]`, or `[rows or more, *shape]` without time.
        control: lengths int32, sources and destinations int64, `[rows]` each.
        finite: `[rows or more]`; None: new states are always finite.
        initial_slot: the source of a fresh row.
        frame: the runner's own.
    """
    lengths, sources, destinations = control
    return compiled.Staging(
        len(sources),
        _columns(inputs, spec.inputs),
        _columns(outputs, spec.outputs),
        lengths,
        sources,
        destinations,
        None if finite is None else finite.view(np.uint8),
        initial_slot,
        frame,
    )


def _columns(arrays: Sequence[Array], items: Sequence[spec_pb2.TensorSpec]) -> "compiled.Columns":
    rows = [array.reshape(len(array), -1).view(np.uint8) for array in arrays]
    return compiled.Columns(rows, [time_step_bytes(item) for item in items])


def time_step_bytes(item: spec_pb2.TensorSpec) -> int:
    """Bytes of one time step of one row."""
    return math.prod(item.shape) * to_numpy_dtype(item.dtype).itemsize
