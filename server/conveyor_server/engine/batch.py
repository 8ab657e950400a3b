"""A batch: steps beside each other in one run of the model.

Invariant: each row writes a fresh slot of its own and none that is read, so a batch can fail as a whole or row by row
and the committed state of every session is still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.step import Step
from conveyor_server.runner.base import Run


@dataclass(slots=True, eq=False)
class Batch:
    """Steps of one run.

    Attributes:
        steps: one a row.
        shares: time steps of each row in this run.
        run: what the runner gets.
        ready: sessions that were ready when the batch was taken, those in the batch included.
        taken_at: when it was taken, in seconds of the driver's clock.
        run_s: how long the model ran; set by the engine.
    """

    steps: Sequence[Step]
    shares: Sequence[int]
    run: Run
    ready: int
    taken_at: float
    run_s: float = 0.0

    @property
    def time_steps(self) -> int:
        """Valid time steps of all rows together."""
        return sum(self.shares)


def assemble(
    steps: Sequence[Step], shares: Sequence[int], destinations: Sequence[int], spec: spec_pb2.ModelSpec
) -> Run:
    """The dense arrays of a run, padded with zeros beyond each row's share."""
    sources = [step.working if step.working is not None else step.lane.slot for step in steps]
    fresh = np.array([slot is None for slot in sources], np.bool_)
    return Run(
        sources=np.array([slot or 0 for slot in sources], np.int64),
        destinations=np.array(destinations, np.int64),
        fresh=fresh,
        lengths=np.array(shares, np.int32),
        inputs=[_column(steps, shares, index, item.has_time) for index, item in enumerate(spec.inputs)],
    )


def _column(steps: Sequence[Step], shares: Sequence[int], index: int, has_time: bool) -> Array:
    if not has_time:
        return np.stack([step.inputs[index] for step in steps])
    longest = max(shares)
    parts = [step.inputs[index][step.done : step.done + share] for step, share in zip(steps, shares, strict=True)]
    if min(shares) == longest:
        return np.concatenate(parts).reshape(len(parts), longest, *parts[0].shape[1:])
    column = np.zeros((len(parts), longest, *parts[0].shape[1:]), parts[0].dtype)
    for row, part in enumerate(parts):
        column[row, : len(part)] = part
    return column
