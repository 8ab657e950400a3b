"""A batch: steps beside each other in one run of the model.

Invariant: each row writes a fresh slot of its own and none that is read, so a batch can fail as a whole or row by row
and the committed state of every session is still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.lanes import Lanes
from conveyor_server.engine.step import Step
from conveyor_server.runner.base import Run


@dataclass(slots=True, eq=False)
class Batch:
    """Steps of one run: the rows of the cohorts first, then one row for each step.

    Attributes:
        cohorts: whole, and all of one length bucket.
        steps: one a row.
        shares: time steps of each of the steps in this run.
        run: what the runner gets.
        ready: sessions that were ready when the batch was taken, those in the batch included.
        taken_at: when it was taken, in seconds of the driver's clock.
        rows: of all together.
        longest: time steps of the longest row.
        time_steps: valid time steps of all rows together.
        run_s: how long the model ran; set by the engine.
        ran_from: when it began, as time.perf_counter tells; set by the engine.
    """

    cohorts: Sequence[Cohort]
    steps: Sequence[Step]
    shares: Sequence[int]
    run: Run
    ready: int
    taken_at: float
    rows: int = 0
    longest: int = 0
    time_steps: int = 0
    run_s: float = 0.0
    ran_from: float = 0.0

    def __post_init__(self) -> None:
        self.rows = len(self.steps)
        self.longest = max(self.shares, default=0)
        self.time_steps = sum(self.shares)
        for cohort in self.cohorts:
            rows = len(cohort.members)
            self.rows += rows
            self.longest = max(self.longest, cohort.length)
            self.time_steps += rows * cohort.length


def assemble(
    cohorts: Sequence[Cohort],
    alone: Sequence[tuple[Step, int]],
    destinations: NDArray[np.int64],
    lanes: Lanes,
    spec: spec_pb2.ModelSpec,
) -> Run:
    """The dense arrays of a run, padded with zeros beyond each row's share; `alone` are steps with their shares."""
    if not cohorts and len(alone) == 1:
        step, share = alone[0]
        slot = step.lane.slot if step.working is None else step.working
        parts = [
            array[np.newaxis, step.done : step.done + share] if item.has_time else array[np.newaxis]
            for array, item in zip(step.inputs, spec.inputs, strict=True)
        ]
        return assemble_one(slot, int(destinations[0]), share, parts)
    if len(cohorts) == 1 and not alone:
        (cohort,) = cohorts
        sources, inputs = lanes.held[cohort.where], cohort.inputs
        lengths = np.full(len(sources), cohort.length, np.int32)
    else:
        held = [step.working + 1 if step.working is not None else _held(step) for step, _ in alone]
        sources = np.concatenate([*(lanes.held[cohort.lanes] for cohort in cohorts), np.array(held, np.int64)])
        each = [*(cohort.length for cohort in cohorts for _ in cohort.members), *(share for _, share in alone)]
        longest = max(each)
        lengths = np.array(each, np.int32)
        inputs = [
            _column([cohort.inputs[index] for cohort in cohorts], alone, longest, index)
            if item.has_time
            else np.concatenate(
                [*(cohort.inputs[index] for cohort in cohorts), *(step.inputs[index][np.newaxis] for step, _ in alone)]
            )
            for index, item in enumerate(spec.inputs)
        ]
    return place(sources, destinations, lengths, inputs)


def place(
    held: NDArray[np.int64], destinations: NDArray[np.int64], lengths: NDArray[np.int32], inputs: Sequence[Array]
) -> Run:
    """A run from what lanes hold (see Lanes.held) into these destinations; the rest as of Run."""
    # A fresh row's source is ignored, but must be a slot.
    return Run(np.maximum(held - 1, 0), destinations, held == 0, lengths, inputs)


def assemble_one(slot: int | None, destination: int, length: int, inputs: Sequence[Array]) -> Run:
    """A lone step's: most runs of a server with few sessions are, and arrays of one cost as much as arrays of many."""
    return Run(
        sources=np.array((slot or 0,), np.int64),
        destinations=np.array((destination,), np.int64),
        fresh=_FRESH if slot is None else _USED,
        lengths=np.array((length,), np.int32),
        inputs=inputs,
    )


_FRESH, _USED = np.ones(1, np.bool_), np.zeros(1, np.bool_)


def _held(step: Step) -> int:
    slot = step.lane.slot
    return 0 if slot is None else slot + 1


def _column(blocks: Sequence[Array], alone: Sequence[tuple[Step, int]], longest: int, index: int) -> Array:
    parts = [step.inputs[index][np.newaxis, step.done : step.done + share] for step, share in alone]
    every = [*blocks, *parts]
    if all(part.shape[1] == longest for part in every):
        return np.concatenate(every)
    column = np.zeros((sum(map(len, every)), longest, *every[0].shape[2:]), every[0].dtype)
    row = 0
    for part in every:
        column[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return column
