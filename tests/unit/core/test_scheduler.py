"""Who runs next: buckets, turns, fairness, bounds."""

from conveyor_server.engine.lanes import Lane, Lanes
from conveyor_server.engine.step import Step
from conveyor_server.scheduler import Scheduler


def make(**options):
    return Scheduler(**{"max_batch": 4, "quantum": 16, "max_batch_time_steps": 64, **options})


def steps(*lengths):
    return [Step(Lane(Lanes(1), 0), (), length) for length in lengths]


def always(_):
    return True


def add(scheduler, *lengths):
    added = steps(*lengths)
    for step in added:
        scheduler.add(step)
    return added


def test_everything_ready_of_one_length_runs_together():
    scheduler = make()
    ones = add(scheduler, 1, 1, 1)
    assert scheduler.take(always) == ones
    assert len(scheduler) == 0


def test_rows_are_bounded():
    scheduler = make()
    added = add(scheduler, 1, 1, 1, 1, 1)
    assert scheduler.take(always) == added[:4]
    assert scheduler.take(always) == added[4:]


def test_padded_time_steps_are_bounded_and_one_row_always_runs():
    scheduler = make(max_batch_time_steps=32)
    added = add(scheduler, 16, 16, 16)
    assert scheduler.take(always) == added[:2]
    scheduler = make(max_batch_time_steps=8)
    added = add(scheduler, 16)
    assert scheduler.take(always) == added


def test_lengths_within_a_factor_of_two_share_a_batch():
    scheduler = make()
    added = add(scheduler, 5, 8, 3, 6)
    assert scheduler.take(always) == [added[2]]
    assert scheduler.take(always) == [added[0], added[1], added[3]]


def test_buckets_take_turns_so_a_flood_of_long_steps_never_starves_short_ones():
    scheduler = make(max_batch=1)
    add(scheduler, *[100] * 10)
    (short,) = add(scheduler, 1)
    first, second = scheduler.take(always), scheduler.take(always)
    assert short in first + second
    add(scheduler, *[1] * 10)
    (long,) = add(scheduler, 100)
    taken = [scheduler.take(always)[0] for _ in range(3)]
    assert any(step.length == 100 for step in taken)
    assert any(step.length == 1 for step in taken)
    assert long not in taken


def test_a_begun_step_goes_first_in_its_bucket():
    scheduler = make(max_batch=1)
    fresh, begun = steps(40, 40)
    begun.done, begun.working = 16, 3
    scheduler.add(fresh)
    scheduler.add(begun)
    assert scheduler.take(always) == [begun]


def test_long_steps_begin_only_while_they_may_and_others_pass():
    scheduler = make()
    long = add(scheduler, 100, 100, 100)
    assert scheduler.take(lambda begun: begun < 2) == long[:2]
    assert scheduler.take(lambda _: False) == []
    (short,) = add(scheduler, 2)
    assert scheduler.take(lambda _: False) == [short]
    assert len(scheduler) == 1


def test_a_removed_step_is_gone():
    scheduler = make()
    one, two = add(scheduler, 1, 1)
    assert scheduler.remove(one)
    assert not scheduler.remove(one)
    assert scheduler.take(always) == [two]


def test_a_quantum_that_is_no_power_of_two():
    scheduler = make(quantum=12)
    added = add(scheduler, 12, 9, 30)
    assert scheduler.take(always) == added
    assert scheduler.share(added[2]) == 12


def test_a_step_of_about_that_length_waits():
    scheduler = make(quantum=16)
    assert not any(scheduler.waits(length) for length in (1, 2, 16, 400))
    add(scheduler, 3)
    assert [length for length in (1, 2, 3, 4, 5, 16, 400) if scheduler.waits(length)] == [3, 4]
    # What is longer than a quantum waits where a quantum does.
    add(scheduler, 100)
    assert [length for length in (1, 4, 8, 9, 16, 17, 400) if scheduler.waits(length)] == [4, 9, 16, 17, 400]
    while scheduler:
        scheduler.take(always)
    assert not any(scheduler.waits(length) for length in (1, 4, 16, 400))
