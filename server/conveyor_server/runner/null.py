"""A model that runs nothing: what sessions and scheduler cost is what is left. For diagnostics.

Invariant: it takes what its model takes and answers zeros in the shapes of its model's outputs, at once.
"""

import copy
from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

from conveyor_server import compiled
from conveyor_server.runner.base import Run, RunResult
from conveyor_server.runner.staging import can_be_staged, stage


class NullRunner:
    """A Runner. See base.Runner.

    Args:
        spec: of the model that it stands beside; its own is the same without states.
        capacity: slots.
    """

    device = "none"
    vectors = None

    def __init__(self, spec: spec_pb2.ModelSpec, capacity: int) -> None:
        self._spec = copy.deepcopy(spec)
        self._spec.name = f"{spec.name}.null"
        self._spec.digest = f"null of {spec.digest}"
        self._spec.state_bytes = 0
        del self._spec.states[:]
        self._capacity = capacity
        self._results: dict[tuple[int, int], RunResult] = {}
        self._stagings: dict[int, compiled.Staging] = {}

    @property
    def spec(self) -> spec_pb2.ModelSpec:
        """The model's description, without states."""
        return self._spec

    @property
    def capacity(self) -> int:
        """Slots, which hold nothing."""
        return self._capacity

    def step(self, run: Run) -> RunResult:
        """Zeros. They are never written to, so that one result of each size does."""
        size = (len(run.lengths), int(run.lengths.max()))
        known = self._results.get(size)
        if known is None:
            rows, time = size
            outputs = [
                np.zeros(
                    (rows, time, *item.shape) if item.has_time else (rows, *item.shape), to_numpy_dtype(item.dtype)
                )
                for item in self._spec.outputs
            ]
            known = self._results[size] = RunResult(outputs, np.ones(rows, np.bool_))
        return known

    def staging(self, rows: int) -> "compiled.Staging | None":
        """See base.Runner; what is put there is as if it had been run."""
        known = self._stagings.get(rows)
        if known is None and can_be_staged(self._spec):
            inputs, outputs = (
                [np.zeros((rows, *item.shape), to_numpy_dtype(item.dtype)) for item in items]
                for items in (self._spec.inputs, self._spec.outputs)
            )
            control = np.ones(rows, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
            known = stage(self._spec, inputs, outputs, control, None, initial_slot=0, frame=None)
            self._stagings[rows] = known
        return known

    def run_staged(self, staging: "compiled.Staging") -> None:
        """Its outputs are zeros, as they were."""

    def read_rows(self, slots: Sequence[int]) -> list[Array]:
        """No states, so no rows."""
        del slots
        return []

    def write_rows(self, slots: Sequence[int], states: Sequence[Array]) -> None:
        """No states, so nothing to write."""

    def close(self) -> None:
        """Holds nothing."""
        self._results.clear()
        self._stagings.clear()
