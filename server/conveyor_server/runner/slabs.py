"""Slabs: the memory of all rows of state, on the host or on the device.

Invariant: a slab is one OrtValue for its whole life, bound to graphs as input and as output, so that a run changes
rows in place. Rows 0 to capacity - 1 are the slots; the rows after them belong to the runner.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

from conveyor_server.runner import graph
from conveyor_server.runner.provider import Host, open_session


class Slabs(Protocol):
    """The slabs of a model, one for each of ModelSpec.states."""

    @property
    def values(self) -> Sequence[Any]:
        """The OrtValues `[rows, *shape]`."""

    def read(self, slots: Sequence[int]) -> list[Array]:
        """Copies of rows: `[len(slots), *shape]` for each state."""

    def write(self, slots: Sequence[int], rows: Sequence[Array]) -> None:
        """Writes rows `[len(slots), *shape]` of each state; ValueError where a shape or dtype is another."""


class HostSlabs:
    """Slabs in host memory: onnxruntime and numpy see the same bytes.

    A page costs memory only once a row on it is written.
    """

    def __init__(self, states: Sequence[spec_pb2.StateSpec], rows: int) -> None:
        self._arrays = [np.zeros((rows, *state.shape), to_numpy_dtype(state.dtype)) for state in states]
        self.values: Sequence[Any] = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]

    def read(self, slots: Sequence[int]) -> list[Array]:
        """Copies of rows: `[len(slots), *shape]` for each state."""
        index = np.asarray(slots, np.int64)
        return [array[index] for array in self._arrays]

    def write(self, slots: Sequence[int], rows: Sequence[Array]) -> None:
        """Writes rows `[len(slots), *shape]` of each state; ValueError where a shape or dtype is another."""
        index = np.asarray(slots, np.int64)
        for array, new in zip(self._arrays, checked(rows, self._arrays, len(index)), strict=True):
            array[index] = new


class DeviceSlabs:
    """Slabs in device memory, uninitialised; rows travel through two small graphs, and nothing else does.

    The code is the same for every device, the host included.
    """

    def __init__(self, spec: spec_pb2.ModelSpec, rows: int, host: Host) -> None:
        self._like = [np.empty((0, *state.shape), to_numpy_dtype(state.dtype)) for state in spec.states]
        self.values: Sequence[Any] = [
            ort.OrtValue.ortvalue_from_shape_and_type((rows, *like.shape[1:]), like.dtype, host.device, 0)
            for like in self._like
        ]
        self._gather = open_session(graph.gather_rows(spec), host, name="the graph that reads rows")
        self._scatter = open_session(graph.scatter_rows(spec), host, name="the graph that writes rows")

    def read(self, slots: Sequence[int]) -> list[Array]:
        """Copies of rows: `[len(slots), *shape]` for each state."""
        if not len(slots):
            return [like.copy() for like in self._like]
        binding, index = self._gather.io_binding(), np.array(slots, np.int64)
        rows = [np.empty((len(index), *like.shape[1:]), like.dtype) for like in self._like]
        binding.bind_cpu_input(graph.SLOTS, index)
        for number, (value, row) in enumerate(zip(self.values, rows, strict=True)):
            binding.bind_ortvalue_input(graph.slab_input(number), value)
            binding.bind_ortvalue_output(graph.row_value(number), ort.OrtValue.ortvalue_from_numpy(row))
        binding.synchronize_inputs()
        self._gather.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [*rows]

    def write(self, slots: Sequence[int], rows: Sequence[Array]) -> None:
        """Writes rows `[len(slots), *shape]` of each state; ValueError where a shape or dtype is another."""
        new = [np.ascontiguousarray(row) for row in checked(rows, self._like, len(slots))]
        if not len(slots):
            return
        binding, index = self._scatter.io_binding(), np.array(slots, np.int64)[:, np.newaxis]
        binding.bind_cpu_input(graph.SLOTS, index)
        for number, (value, row) in enumerate(zip(self.values, new, strict=True)):
            binding.bind_ortvalue_input(graph.slab_input(number), value)
            binding.bind_cpu_input(graph.row_value(number), row)
            binding.bind_ortvalue_output(graph.slab_output(number), value)
        binding.synchronize_inputs()
        self._scatter.run_with_iobinding(binding)
        binding.synchronize_outputs()


def checked(rows: Sequence[Array], slabs: Sequence[Array], count: int) -> Sequence[Array]:
    """The rows, if they are `count` rows of each slab's shape and dtype; else ValueError."""
    if len(rows) != len(slabs):
        raise ValueError(f"{len(rows)} states were given and the model has {len(slabs)}")
    for row, slab in zip(rows, slabs, strict=True):
        if row.shape != (count, *slab.shape[1:]) or row.dtype != slab.dtype:
            wanted = f"{slab.dtype} {[count, *slab.shape[1:]]}"
            raise ValueError(f"rows of {wanted} are wanted and {row.dtype} {list(row.shape)} came")
    return rows
