"""Steps of many sessions that go through scheduler and engine as one entry."""

import numpy as np
import pytest
from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.engine.lanes import Lane, Lanes
from conveyor_server.engine.step import Step
from conveyor_server.scheduler import Scheduler

from tests.unit.core.conftest import SumRunner


class Owner:
    """Makes Steps of the rows that leave."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.inputs: dict[int, list[np.ndarray]] = {}
        self.left: list[tuple[int, bool]] = []

    def claim(self, member: int, *, running: bool) -> Step:
        self.left.append((member, running))
        return Step(Lane(self.lanes, member), self.inputs[member], len(self.inputs[member][0]), member)


def make_cohort(owner: Owner, members: list[int], rows: list[list[float]]) -> Cohort:
    """Each member's lane has its number."""
    numbers = np.array(members)
    x = np.array(rows, np.float64)[:, :, None]
    owner.inputs |= {member: [row] for member, row in zip(members, x, strict=True)}
    return Cohort(owner, numbers, numbers, numbers, [x], x.shape[1], 0.0, 1.0)


@pytest.fixture
def engine() -> Engine:
    limits = EngineLimits(max_batch=4, quantum=4, max_batch_time_steps=16)
    return Engine(SumRunner(limits.capacity(16)), model="sum", version="1", limits=limits)


@pytest.fixture
def owner(engine: Engine) -> Owner:
    return Owner(engine.lanes)


def deliver(engine: Engine):
    """Runs one batch; returns it and the steps that are finished."""
    batch = engine.next_batch(0.0)
    return batch, engine.deliver(batch, engine.run(batch), 1.0)


def state(engine: Engine, lane: int) -> float:
    rows = engine.read(Lane(engine.lanes, lane))
    return 10.0 if rows is None else float(rows[0][0])


# ---------------------------------------------------------------- the cohort itself


def test_a_cohort_drops_the_rows_that_left(owner):
    cohort = make_cohort(owner, [3, 5, 7], [[1.0], [2.0], [3.0]])
    cohort.taken |= {5}
    assert cohort.rows == 2
    cohort.compact()
    assert (cohort.members.tolist(), cohort.lanes.tolist(), cohort.rows) == ([3, 7], [3, 7], 2)
    assert cohort.inputs[0][:, 0, 0].tolist() == [1.0, 3.0]
    assert not cohort.taken


def test_a_cohort_splits_by_rows(owner):
    cohort = make_cohort(owner, [1, 2, 3], [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
    first = cohort.split(2)
    assert (first.members.tolist(), cohort.members.tolist()) == ([1, 2], [3])
    assert (first.lanes.tolist(), cohort.lanes.tolist()) == ([1, 2], [3])
    assert (first.inputs[0].shape, cohort.inputs[0].shape) == ((2, 2, 1), (1, 2, 1))
    assert (first.owner, first.length, first.deadline) == (owner, 2, 1.0)


# ---------------------------------------------------------------- the scheduler


def always(_):
    return True


def make_scheduler(**options):
    return Scheduler(**{"max_batch": 4, "quantum": 16, "max_batch_time_steps": 64, **options})


def test_cohorts_and_steps_of_one_length_share_a_batch_in_their_order(owner):
    scheduler = make_scheduler()
    cohort = make_cohort(owner, [1, 2], [[1.0], [1.0]])
    first, last = (Step(Lane(owner.lanes, lane), (), 1) for lane in (8, 9))
    scheduler.add(first)
    scheduler.add_cohort(cohort)
    scheduler.add(last)
    assert len(scheduler) == 4
    assert scheduler.take(always) == [first, cohort, last]
    assert len(scheduler) == 0


def test_a_cohort_that_does_not_fit_is_split_and_its_rest_goes_first(owner):
    scheduler = make_scheduler()
    step = Step(Lane(owner.lanes, 9), (), 1)
    cohort = make_cohort(owner, [0, 1, 2, 3, 4], [[1.0]] * 5)
    scheduler.add(step)
    scheduler.add_cohort(cohort)
    taken = scheduler.take(always)
    assert taken[0] is step
    assert taken[1].members.tolist() == [0, 1, 2]
    assert len(scheduler) == 2
    late = Step(Lane(owner.lanes, 10), (), 1)
    scheduler.add(late)
    (rest, after) = scheduler.take(always)
    assert rest is cohort
    assert rest.members.tolist() == [3, 4]
    assert after is late


def test_padded_time_steps_bound_cohorts_too(owner):
    scheduler = make_scheduler(max_batch_time_steps=8)
    scheduler.add_cohort(make_cohort(owner, [0, 1, 2], [[1.0] * 3] * 3))
    assert scheduler.take(always)[0].members.tolist() == [0, 1]
    assert scheduler.take(always)[0].members.tolist() == [2]


def test_members_that_left_take_no_room_and_an_empty_cohort_is_nothing(owner):
    scheduler = make_scheduler(max_batch=2)
    whole, empty = make_cohort(owner, [0, 1, 2], [[1.0]] * 3), make_cohort(owner, [3], [[1.0]])
    scheduler.add_cohort(empty)
    scheduler.add_cohort(whole)
    scheduler.left(whole, 0)
    scheduler.left(empty, 3)
    assert len(scheduler) == 2
    (taken,) = scheduler.take(always)
    assert (taken is whole, taken.members.tolist()) == (True, [1, 2])
    assert (scheduler.take(always), len(scheduler)) == ([], 0)


def test_a_bucket_of_nothing_but_empty_cohorts_lets_the_next_one_run(owner):
    scheduler = make_scheduler()
    empty = make_cohort(owner, [3], [[1.0]])
    scheduler.add_cohort(empty)
    scheduler.left(empty, 3)
    long = Step(Lane(owner.lanes, 9), (), 8)
    scheduler.add(long)
    assert scheduler.take(always) == [long]


# ---------------------------------------------------------------- the engine


def test_a_cohort_is_committed_as_one(engine, owner):
    for turn in range(1, 4):
        cohort = make_cohort(owner, [1, 5, 6], [[1.0], [2.0], [3.0]])
        engine.submit_cohort(cohort)
        assert engine.ready == 3
        batch, finished = deliver(engine)
        assert (batch.rows, batch.longest, batch.time_steps, finished) == (3, 1, 3, [])
        assert cohort.outputs[0][:, 0, 0].tolist() == [10.0 + turn, 10.0 + 2 * turn, 10.0 + 3 * turn]
        assert cohort.outputs[1][:, 0].tolist() == [10.0 + turn, 10.0 + 2 * turn, 10.0 + 3 * turn]
        assert not cohort.running
    engine.slots.check([Lane(engine.lanes, lane).slot for lane in (1, 5, 6)])


def test_cohorts_and_steps_of_other_lengths_are_padded_and_told_apart(engine, owner):
    one, two = make_cohort(owner, [1], [[1.0, 1.0, 1.0]]), make_cohort(owner, [2], [[2.0] * 4])
    step = Step(Lane(engine.lanes, 3), [np.full((3, 1), 3.0)], 3)
    for cohort in (one, two):
        engine.submit_cohort(cohort)
    engine.submit(step)
    batch, finished = deliver(engine)
    assert (batch.rows, batch.run.lengths.tolist()) == (3, [3, 4, 3])
    assert finished == [step]
    assert one.outputs[0][0, :, 0].tolist() == [11.0, 12.0, 13.0]
    assert two.outputs[0][0, :, 0].tolist() == [12.0, 14.0, 16.0, 18.0]
    assert step.outputs[0][:, 0].tolist() == [13.0, 16.0, 19.0]
    assert [float(item.outputs[1][0, 0]) for item in (one, two)] == [13.0, 18.0]


def test_a_row_that_is_not_finite_leaves_its_cohort_and_shifts_no_other(engine, owner):
    """The rows behind it, of its cohort, of the next cohort and of steps, get their own outputs and states."""
    first = make_cohort(owner, [1, 2], [[SumRunner.OVERFLOW], [2.0]])
    second = make_cohort(owner, [3], [[3.0]])
    step = Step(Lane(engine.lanes, 4), [np.full((1, 1), 4.0)], 1)
    for cohort in (first, second):
        engine.submit_cohort(cohort)
    engine.submit(step)
    _, finished = deliver(engine)
    bad, good = finished
    assert (bad.context, bad.fault.reason_name, good) == (1, "STATE_NON_FINITE", step)
    assert owner.left == [(1, True)]
    assert (first.members.tolist(), second.members.tolist()) == ([2], [3])
    assert (first.outputs[0].tolist(), second.outputs[0].tolist()) == ([[[12.0]]], [[[13.0]]])
    assert step.outputs[0].tolist() == [[14.0]]
    assert [state(engine, lane) for lane in (1, 2, 3, 4)] == [10.0, 12.0, 13.0, 14.0]
    engine.slots.check([Lane(engine.lanes, lane).slot for lane in (2, 3, 4)])


def test_a_row_that_was_asked_for_while_it_ran_is_finished_as_a_step(engine, owner):
    cohort = make_cohort(owner, [1, 2, 3], [[1.0], [2.0], [3.0]])
    engine.submit_cohort(cohort)
    batch = engine.next_batch(0.0)
    engine.detach(cohort, 2)
    assert owner.left == [(2, True)]
    (step,) = engine.deliver(batch, engine.run(batch), 1.0)
    assert (step.context, step.fault, step.outputs[0].tolist()) == (2, None, [[12.0]])
    assert cohort.members.tolist() == [1, 3]
    assert cohort.outputs[0][:, 0, 0].tolist() == [11.0, 13.0]
    assert [state(engine, lane) for lane in (1, 2, 3)] == [11.0, 12.0, 13.0]


def test_a_row_that_was_asked_for_while_it_waited_runs_as_a_step(engine, owner):
    cohort = make_cohort(owner, [1, 2, 3], [[1.0], [2.0], [3.0]])
    engine.submit_cohort(cohort)
    engine.detach(cohort, 2)
    assert (owner.left, engine.ready) == ([(2, False)], 3)
    batch, (step,) = deliver(engine)
    assert batch.rows == 3
    assert step.outputs[0].tolist() == [[12.0]]
    assert cohort.outputs[0][:, 0, 0].tolist() == [11.0, 13.0]


def test_a_row_of_the_part_that_runs_and_one_of_the_part_that_waits(engine, owner):
    cohort = make_cohort(owner, [0, 1, 2, 3, 4, 5], [[float(row)] for row in range(6)])
    engine.submit_cohort(cohort)
    batch = engine.next_batch(0.0)
    assert batch.rows == 4
    for member in (1, 5):
        engine.detach(cohort, member)
    assert owner.left == [(1, True), (5, False)]
    assert [step.context for step in engine.deliver(batch, engine.run(batch), 1.0)] == [1]
    batch, finished = deliver(engine)
    assert (batch.rows, [step.context for step in finished]) == (2, [5])
    assert [state(engine, lane) for lane in range(6)] == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    engine.slots.check([Lane(engine.lanes, lane).slot for lane in range(6)])


def test_a_run_that_raises_is_repeated_in_halves_with_the_rows_of_its_cohorts(engine, owner):
    first, second = make_cohort(owner, [1, 2], [[1.0], [SumRunner.POISON]]), make_cohort(owner, [3], [[3.0]])
    step = Step(Lane(engine.lanes, 4), [np.full((1, 1), 4.0)], 1, 4)
    engine.submit_cohort(first)
    engine.submit_cohort(second)
    engine.submit(step)
    finished = []
    while engine.ready:
        finished += deliver(engine)[1]
    faults = {step.context: step.fault and step.fault.reason_name for step in finished}
    assert faults == {1: None, 2: "MODEL_FAILED", 3: None, 4: None}
    assert [state(engine, lane) for lane in (1, 2, 3, 4)] == [11.0, 10.0, 13.0, 14.0]
    assert (len(first.members), len(second.members)) == (0, 0)
    engine.slots.check([Lane(engine.lanes, lane).slot for lane in (1, 3, 4)])


def test_a_row_that_left_a_run_that_raises_is_its_own_suspect(engine, owner):
    cohort = make_cohort(owner, [1, 2], [[1.0], [SumRunner.POISON]])
    engine.submit_cohort(cohort)
    batch = engine.next_batch(0.0)
    engine.detach(cohort, 1)
    assert engine.deliver(batch, engine.run(batch), 1.0) == []
    assert owner.left == [(1, True), (2, True)]
    outcomes = {}
    while engine.ready:
        outcomes |= {step.context: step.fault is None for step in deliver(engine)[1]}
    assert outcomes == {1: True, 2: False}
