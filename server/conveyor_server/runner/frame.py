"""A frame: the buffers and the binding of one batch shape, made once and used for every run of that shape.

Invariant: between `put` and `take` a frame's buffers hold one run; what `take` returns shares no memory with them.
Whoever fills them in place (`staging`) reads the outputs before the next `put`.
Copying a few rows in and out costs less than binding new arrays: 0.3 us against 1 to 3 us each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server import compiled
from conveyor_server.runner import graph
from conveyor_server.runner.base import Run, RunResult
from conveyor_server.runner.staging import stage


@dataclass(frozen=True, slots=True)
class FrameShape:
    """Rows and time steps of a run, and of the buffers it lies in; what is more of these is padding."""

    batch: int
    time: int
    buffer_rows: int
    buffer_time: int


class Frame:
    """Buffers and binding of one batch shape. Thread of the run."""

    def __init__(
        self,
        binding: Any,
        spec: spec_pb2.ModelSpec,
        slabs: Sequence[Any],
        shape: FrameShape,
        *,
        initial_slot: int,
        scratch_slot: int,
        shares_memory: bool,
    ) -> None:
        """Makes the buffers and binds them.

        Args:
            binding: a new IOBinding of the wrapped graph's session.
            spec: the model's description.
            slabs: OrtValue of each state's slab.
            shape: rows and time steps.
            initial_slot: the slab's row that holds the initial state.
            scratch_slot: the slab's row that a padding row may write.
            shares_memory: onnxruntime sees what is written into a bound buffer (see Host).
        """
        self.binding = binding
        self._spec = spec
        self._fed: dict[str, Array] = {}
        self._outputs: list[Array] = []
        self._put: list[Array] = []
        self._take: list[Array] = []
        for item in spec.inputs:
            buffer = np.zeros(_dims(item, shape.buffer_rows, shape.buffer_time), to_numpy_dtype(item.dtype))
            self._fed[item.name] = buffer
            self._put.append(_real(buffer, item, shape))
        self._initial_slot = initial_slot
        self._control = self._add_control(spec, shape, scratch_slot)
        for item in spec.outputs:
            buffer = np.zeros(_dims(item, shape.buffer_rows, shape.buffer_time), to_numpy_dtype(item.dtype))
            self._bind_output(item.name, buffer)
            self._outputs.append(buffer)
            self._take.append(_real(buffer, item, shape))
        self._finite = np.ones((1, shape.buffer_rows), np.bool_)
        self._all = np.ones(shape.batch, np.bool_)
        self._all.flags.writeable = False
        if graph.has_finite(spec):
            self._bind_output(graph.FINITE, self._finite)
        for index, slab in enumerate(slabs):
            binding.bind_ortvalue_input(graph.slab_input(index), slab)
            binding.bind_ortvalue_output(graph.slab_output(index), slab)
        self._batch = shape.batch
        self._rebind = not shares_memory  # binding is then what copies to the device
        for name, buffer in self._fed.items():
            binding.bind_cpu_input(name, buffer)
        self.buffer_bytes = sum(item.nbytes for item in (*self._fed.values(), *self._take))

    def put(self, run: Run) -> None:
        """Copies a run into the buffers.

        Raises:
            TypeError, ValueError: an array of another shape or dtype than the frame's; the buffers hold anything.
        """
        arrays = (*run.inputs, run.lengths, run.sources, run.destinations)
        for buffer, array in zip(self._put, arrays, strict=True):
            if array.shape != buffer.shape or array.dtype != buffer.dtype:
                wanted = f"{buffer.dtype} {list(buffer.shape)}"
                raise ValueError(f"{wanted} is wanted and {array.dtype} {list(array.shape)} came")
            buffer[...] = array
        np.copyto(self._control[1], self._initial_slot, where=run.fresh)
        self.feed()

    def feed(self) -> None:
        """Has onnxruntime see what is in the buffers."""
        if self._rebind:
            for name, buffer in self._fed.items():
                self.binding.bind_cpu_input(name, buffer)
            self.binding.synchronize_inputs()

    def staging(self) -> "compiled.Staging":
        """The buffers, to be filled in place. Of a frame of one time step.

        It holds the frame, which must not hold it: what is evicted or closed is to be free at once.
        """
        return stage(
            self._spec,
            [self._fed[item.name] for item in self._spec.inputs],
            self._outputs,
            self._control,
            self._finite[0] if graph.has_finite(self._spec) else None,
            initial_slot=self._initial_slot,
            frame=self,
        )

    def take(self) -> RunResult:
        """What the run gave, in arrays of its own."""
        finite = self._finite[0, : self._batch]
        whole = np.count_nonzero(finite) == self._batch
        return RunResult([buffer.copy() for buffer in self._take], self._all if whole else finite.copy())

    def _add_control(
        self, spec: spec_pb2.ModelSpec, shape: FrameShape, scratch_slot: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Buffers of lengths, sources and destinations; returns those of the rows that are no padding."""
        rows, batch = shape.buffer_rows, shape.batch
        lengths = np.ones(rows, np.int32)
        sources, destinations = np.full(rows, self._initial_slot, np.int64), np.full((rows, 1), scratch_slot, np.int64)
        if spec.lengths_input:
            self._fed[spec.lengths_input] = lengths
        if spec.states:
            self._fed |= {graph.SOURCES: sources, graph.DESTINATIONS: destinations}
        control = lengths[:batch], sources[:batch], destinations[:batch, 0]
        self._put += control
        return control

    def _bind_output(self, name: str, buffer: Array) -> None:
        self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(buffer))


def _dims(item: spec_pb2.TensorSpec, rows: int, time: int) -> tuple[int, ...]:
    return (rows, time, *item.shape) if item.has_time else (rows, *item.shape)


def _real(buffer: Array, item: spec_pb2.TensorSpec, shape: FrameShape) -> Array:
    """The part of a buffer that is no padding."""
    return buffer[: shape.batch, : shape.time] if item.has_time else buffer[: shape.batch]
