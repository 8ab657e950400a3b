"""The engine of one model version: schedule -> run -> deliver.

Invariants: at most one batch is out at a time; a step reads its session's committed slot and writes another, and the
commit is the exchange of the two once the whole step succeeded. Core thread only, but for `run`.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_server.engine.backlog import Backlog
from conveyor_server.engine.batch import Batch, assemble, assemble_one, place
from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.lanes import Lane, Lanes
from conveyor_server.engine.run_times import RunTimes
from conveyor_server.engine.settlement import Row, Settlement, model_failed
from conveyor_server.engine.step import Step
from conveyor_server.inputs import StepReader
from conveyor_server.runner.base import Run, RunFailed, Runner, RunResult
from conveyor_server.scheduler import Scheduler
from conveyor_server.slab import SlotPool

if TYPE_CHECKING:
    from conveyor_server.compiled import Staging


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of one engine.

    Attributes:
        max_batch: rows of one run.
        quantum: time steps of one row in one run.
        max_batch_time_steps: rows times padded time steps of one run.
    """

    max_batch: int = 256
    quantum: int = 16
    max_batch_time_steps: int = 1024

    def capacity(self, max_sessions: int) -> int:
        """Slots that a slab needs: a row for each session, destinations of a run, and states between two quanta."""
        return max_sessions + 2 * self.max_batch


class Engine:
    """Runs the steps of one model version's sessions together.

    Args:
        runner: the model and its slab, of at least `limits.capacity(sessions)` rows.
        model: repository name.
        version: repository version.
        limits: bounds of a run.

    Attributes:
        ran_s: seconds that the model took in the last `run_now`, `run_one_now` or `run_staged` that succeeded.
        ran_from: when it began then, as time.perf_counter tells.
    """

    def __init__(self, runner: Runner, *, model: str, version: str, limits: EngineLimits) -> None:
        self.runner = runner
        self.model = model
        self.version = version
        self.limits = limits
        self.slots = SlotPool(runner.capacity)
        # A session's lane is numbered as its row in the session table, and there are no more of those than slots.
        self.lanes = Lanes(runner.capacity)
        # Read once: a protobuf message is slow to ask, and each row asks.
        self._timed = tuple(item.has_time for item in runner.spec.outputs)
        # All inputs and outputs have time: steps beside each other can run as one longer one.
        self.timed = all(self._timed) and all(item.has_time for item in runner.spec.inputs)
        self.reader = StepReader(runner.spec)
        self.run_times = RunTimes()
        self.ran_s = self.ran_from = 0.0
        self.backlog = Backlog(limits.quantum, limits.max_batch)
        self._scheduler = Scheduler(
            max_batch=limits.max_batch, quantum=limits.quantum, max_batch_time_steps=limits.max_batch_time_steps
        )
        self._settlement = Settlement(self.slots, self._timed, self._scheduler.add)
        self._out: Batch | None = None
        # Halves of a batch that failed: run again apart, until the rows that fail are alone.
        self._suspects: deque[Sequence[Step]] = deque()

    @property
    def spec(self) -> spec_pb2.ModelSpec:
        """The model's description."""
        return self.runner.spec

    @property
    def busy(self) -> bool:
        """A batch is out."""
        return self._out is not None

    @property
    def ready(self) -> int:
        """Steps that wait for a batch."""
        waiting = len(self._scheduler)
        return waiting + sum(map(len, self._suspects)) if self._suspects else waiting

    @property
    def queue_s(self) -> float:
        """How long a step that arrives now would wait, in seconds, as far as the past tells."""
        return self.backlog.queue_s(self.run_times)

    @property
    def full_run_s(self) -> float:
        """Seconds of a run of one time step of as many sessions as one takes; infinity before the first run."""
        return self.run_times.expected_s(self.limits.max_batch, 1)

    def submit(self, step: Step) -> None:
        """Makes a step ready. Its lane must have no other step in the engine."""
        self._scheduler.add(step)

    def submit_cohort(self, cohort: Cohort) -> None:
        """Makes a cohort's steps ready. Their lanes must have no other step in the engine."""
        self._scheduler.add_cohort(cohort)

    def detach(self, cohort: Cohort, member: int) -> None:
        """Makes a member's row a Step of its own, which waits or runs as the row does."""
        for out in self._out.cohorts if self._out is not None else ():
            # The part of the cohort that runs may be another one than the part that waits.
            if out.owner is cohort.owner and member in out.members and member not in out.claimed:
                self._claim(out, member)
                return
        self._scheduler.left(cohort, member)
        self._scheduler.add(cohort.owner.claim(member, running=False))

    def cancel(self, step: Step) -> bool:
        """Takes a step back and rolls its state back; False when it is running, or is about to run again."""
        if step.running or not self._scheduler.remove(step):
            return False
        self._settlement.roll_back(step)
        return True

    def waits(self, length: int) -> bool:
        """Steps of about that many time steps wait, and no batch is out."""
        return self._out is None and self._scheduler.waits(length)

    def fits(self, rows: int, length: int) -> bool:
        """One run can take so many rows of so many time steps each, and no step of about that length is before it.

        Steps of other lengths have their turn before any of this one have theirs again: the next batch is theirs.
        """
        limits = self.limits
        return (
            self._out is None
            and rows <= limits.max_batch
            and length <= limits.quantum
            and rows * length <= limits.max_batch_time_steps
            and not self._scheduler.waits(length)
            and not self._suspects
        )

    def run_now(self, where: slice | NDArray[np.int64], inputs: Sequence[Array], length: int) -> Sequence[Array] | None:
        """Runs a step of each of these lanes, which `fits`, and commits all of them.

        Args:
            where: the lanes, distinct.
            inputs: one for each of ModelSpec.inputs, validated: `[lanes, length, *shape]`, or `[lanes, *shape]`.
            length: time steps of each.

        Returns:
            One for each of ModelSpec.outputs: `[lanes, length, *shape]`, or `[lanes, *shape]` without time; or None:
            the run failed, or a state would be no longer finite, and nothing moved.
        """
        held = self.lanes.held[where]
        count = len(held)
        run = place(held, self.slots.acquire_many(count), np.full(count, length, np.int32), inputs)
        began = time.perf_counter()
        try:
            result = self.runner.step(run)
        except Exception:  # as part of a batch it fails again, and its steps are told what was wrong
            result = None
        if result is None or np.count_nonzero(result.finite) < count:
            self.slots.release_many(run.destinations)
            return None
        self.ran_s, self.ran_from = time.perf_counter() - began, began
        self.run_times.observe(count, length, count * length, self.ran_s)
        self._commit(where, run, slice(0, count))
        return result.outputs

    def run_one_now(self, lane: Lane, inputs: Sequence[Array], length: int) -> Sequence[Array] | None:
        """`run_now` for one lane: inputs and outputs are `[time, *shape]`, or `[*shape]` without time."""
        slot, destination = lane.slot, self.slots.acquire()
        run = assemble_one(slot, destination, length, [array[np.newaxis] for array in inputs])
        began = time.perf_counter()
        try:
            result = self.runner.step(run)
        except Exception:  # as in run_now
            result = None
        if result is None or not result.finite[0]:
            self.slots.release(destination)
            return None
        self.ran_s, self.ran_from = time.perf_counter() - began, began
        self.run_times.observe(1, length, length, self.ran_s)
        lane.slot = destination
        if slot is not None:
            self.slots.release(slot)
        return [array[0] for array in result.outputs]

    def staging(self, rows: int) -> "Staging | None":
        """The runner's buffers for a turn of so many rows, which `fits`; None: it has none. See runner.base.Runner."""
        return self.runner.staging(rows)

    def run_staged(self, staging: "Staging") -> bool:
        """Runs what was filled into the runner's buffers; False: it failed, and nothing moved.

        Lanes and slots are for whoever filled them to move (see Turn.commit), and `observe_run` is to follow.
        """
        began = time.perf_counter()
        try:
            self.runner.run_staged(staging)
        except Exception:  # as in run_now
            return False
        self.ran_s, self.ran_from = time.perf_counter() - began, began
        return True

    def observe_run(self, rows: int) -> None:
        """Learns what the last `run_staged` took, of so many rows; once nobody waits for it."""
        self.run_times.observe(rows, 1, rows, self.ran_s)

    def next_batch(self, now: float) -> Batch | None:
        """Takes the next batch, or None when one is out or nothing is ready."""
        if self._out is not None:
            return None
        ready = self.ready
        if not ready:
            return None
        entries: Sequence[Step | Cohort]
        entries = self._suspects.popleft() if self._suspects else self._scheduler.take(self._may_begin)
        if not entries:
            return None
        spec = self.runner.spec
        cohorts = [entry for entry in entries if isinstance(entry, Cohort)]
        steps = [entry for entry in entries if isinstance(entry, Step)]
        shares = [self._scheduler.share(step) for step in steps]
        for cohort in cohorts:
            cohort.running, cohort.started_at = True, now
        for step in steps:
            step.running = True
            if step.done == 0:
                step.started_at = now
        rows = sum([len(cohort.members) for cohort in cohorts]) + len(steps)
        alone = list(zip(steps, shares, strict=True))
        run = assemble(cohorts, alone, self.slots.acquire_many(rows), self.lanes, spec)
        self._out = Batch(cohorts, steps, shares, run, ready, now)
        self.backlog.taken(self._out, min([entry.submitted_at for entry in entries]))
        return self._out

    def run(self, batch: Batch) -> RunResult | RunFailed:
        """Runs the model. Any one thread at a time; touches nothing of the core but when the batch ran."""
        began = batch.ran_from = time.perf_counter()
        try:
            return self.runner.step(batch.run)
        except RunFailed as failure:
            return failure
        finally:
            batch.run_s = time.perf_counter() - began

    def deliver(self, batch: Batch, result: RunResult | RunFailed, now: float) -> list[Step]:
        """Commits or rolls back each row, and returns the steps that are finished, in the batch's order.

        The cohorts of a batch that ran are finished with it: what is left of them has its outputs, and their rows that
        did not succeed are among the steps.
        """
        if self._out is not batch:
            raise AssertionError("delivered a batch that is not out")
        self._out = None
        if isinstance(result, RunFailed):
            return self._fail(batch, result, now)
        self.run_times.observe(batch.rows, batch.longest, batch.time_steps, batch.run_s)
        self.backlog.delivered(batch, now)
        finished: list[Step] = []
        row = 0
        for cohort in batch.cohorts:
            # Counted before some of them leave it.
            count = len(cohort.members)
            finished += self._land(cohort, row, batch.run, result, now)
            row += count
        for step, share in zip(batch.steps, batch.shares, strict=True):
            finished += self._settlement.settle(step, share, Row(row, batch.run.destinations, result), now)
            row += 1
        return finished

    def _land(self, cohort: Cohort, first: int, run: Run, result: RunResult, now: float) -> list[Step]:
        """Commits the cohort's rows, which are the run's from `first` on; returns those that left it."""
        here: slice | NDArray[np.int64] = slice(first, first + len(cohort.members))
        finite = result.finite[here]
        finished: list[Step] = []
        if cohort.claimed or np.count_nonzero(finite) < len(finite):
            claims = {int(member): row for row, member in enumerate(cohort.members) if int(member) in cohort.claimed}
            for row in np.flatnonzero(~finite).tolist():
                member = int(cohort.members[row])
                if member not in claims:
                    self._claim(cohort, member)
                    claims[member] = row
            for member, row in claims.items():
                own = Row(first + row, run.destinations, result)
                finished += self._settlement.settle(cohort.claimed[member], cohort.length, own, now)
            good = np.ones(len(cohort.members), np.bool_)
            good[list(claims.values())] = False
            here = first + np.flatnonzero(good)
            cohort.members = cohort.members[good]
            cohort.lanes = cohort.where = cohort.lanes[good]
        cohort.outputs = [
            array[here, : cohort.length] if timed else array[here]
            for array, timed in zip(result.outputs, self._timed, strict=True)
        ]
        self._commit(cohort.where, run, here)
        cohort.running = False
        return finished

    def _commit(self, where: slice | NDArray[np.int64], run: Run, here: slice | NDArray[np.int64]) -> None:
        """These lanes hold what those rows of a run have written, and no longer what they have read."""
        left, fresh = run.sources[here], run.fresh[here]
        self.slots.release_many(left[~fresh] if np.count_nonzero(fresh) else left)
        self.lanes.held[where] = run.destinations[here] + 1

    def _claim(self, cohort: Cohort, member: int) -> Step:
        """Makes a member's row of a cohort that runs a Step that runs."""
        step = cohort.claimed[member] = cohort.owner.claim(member, running=True)
        step.running, step.started_at = True, cohort.started_at
        return step

    def _fail(self, batch: Batch, failure: RunFailed, now: float) -> list[Step]:
        """A run failed and nothing moved: a row alone is to blame, rows together run again in halves."""
        self.slots.release_many(batch.run.destinations)
        steps = [*batch.steps]
        for cohort in batch.cohorts:
            steps += [cohort.claimed.get(member) or self._claim(cohort, member) for member in cohort.members.tolist()]
            cohort.members, cohort.lanes, cohort.running = cohort.members[:0], cohort.lanes[:0], False
        if len(steps) > 1:
            half = len(steps) // 2
            self._suspects.extend((steps[:half], steps[half:]))
            return []
        return self._settlement.fail(steps[0], model_failed(self.model, self.version, failure), now)

    def read(self, lane: Lane) -> list[Array] | None:
        """Copies of a lane's committed state, one `[*shape]` array for each of ModelSpec.states; None: fresh."""
        if lane.slot is None:
            return None
        return [state[0] for state in self.runner.read_rows([lane.slot])]

    def write(self, lane: Lane, states: Sequence[Array]) -> None:
        """Gives a lane without a step a state of its own, one `[*shape]` array for each of ModelSpec.states."""
        if lane.slot is None:
            lane.slot = self.slots.acquire()
        self.runner.write_rows([lane.slot], [np.asarray(state)[None] for state in states])

    def free(self, lane: Lane) -> None:
        """Gives a lane's slot back. The lane must have no step in the engine."""
        if lane.slot is not None:
            self.slots.release(lane.slot)
            lane.slot = None

    def _may_begin(self, begun: int) -> bool:
        # Keep a run's destinations in reserve: steps that have begun can then always go on, and finish.
        return self.slots.free - begun > self.limits.max_batch
