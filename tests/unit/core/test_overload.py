"""What is refused when there is too much to do, and what is not; and that saying no is cheap."""

import numpy as np
import pytest
from conveyor_server.engine.backlog import Backlog
from conveyor_server.engine.batch import Batch
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.engine.run_times import RunTimes
from conveyor_server.runner.base import Run
from conveyor_server.sessions.events import Declined, Landed

from tests.unit.core.conftest import SumRunner
from tests.unit.core.test_offers import Sink, offer_of

# An LSTM of 256 units on one core, in its fastest size.
TIME_STEP_S = 6e-6


def batch(rows, taken_at, run_s):
    lengths = np.ones(rows, np.int32)
    run = Run(lengths.astype(np.int64), lengths.astype(np.int64), lengths > 0, lengths, [])
    made = Batch([], [None] * rows, [1] * rows, run, rows, taken_at)
    made.run_s = run_s
    return made


def test_a_step_counts_with_one_quantum_and_what_it_costs_beside_the_model():
    backlog = Backlog(quantum=16, max_batch=256)
    backlog.add(1)
    backlog.add(512)
    backlog.add(4, 3)
    backlog.row_s = 10.0
    assert (backlog.steps, backlog.time_steps) == (5, 1 + 16 + 12)
    assert backlog.queue_s(RunTimes({(1, 1): 0.5})) == 29 * 0.5 + 50.0
    backlog.remove(512)
    backlog.remove(4, 3)
    assert (backlog.steps, backlog.time_steps) == (1, 1)


def test_what_a_row_costs_is_learned_while_there_is_always_something_to_do():
    backlog = Backlog(quantum=16, max_batch=256)
    first, second = batch(100, 1.0, 0.03), batch(100, 1.1, 0.03)
    backlog.taken(first, 0.9)
    backlog.delivered(first, 1.09)
    backlog.taken(second, 1.05)
    assert backlog.row_s == pytest.approx(0.07 / 100)
    backlog.delivered(second, 1.14)
    # Everything that waited had been served: what came later says nothing about the time between.
    backlog.taken(batch(100, 9.0, 0.3), 2.5)
    assert backlog.row_s == pytest.approx(0.07 / 100)


def test_a_process_that_stood_still_tells_nothing_of_a_row():
    backlog = Backlog(quantum=16, max_batch=256)
    backlog.delivered(batch(100, 1.0, 0.03), 1.09)
    backlog.taken(batch(100, 5.1, 0.03), 1.05)
    assert backlog.row_s == 1e-3
    backlog.delivered(batch(100, 5.1, 0.03), 5.2)
    backlog.taken(batch(100, 9.1, 0.03), 5.15)
    assert backlog.row_s == pytest.approx(0.8e-3 + 0.2 * 4e-3)


def test_small_runs_say_nothing_of_what_a_row_costs():
    backlog = Backlog(quantum=16, max_batch=256)
    backlog.delivered(batch(2, 1.0, 0.3), 1.9)
    backlog.taken(batch(2, 2.0, 0.3), 1.5)
    assert backlog.row_s == 0.0


@pytest.fixture
def busy(make_core):
    """A core whose model takes 6 us for a time step."""
    limits = EngineLimits(max_batch=256, quantum=64, max_batch_time_steps=256)
    core = make_core(limits, max_sessions=20_000, pipeline_queue_s=0.01)
    core.engine.run_times = RunTimes({(256, 1): 256 * TIME_STEP_S})
    return core


def sessions_of(core, count):
    sessions = [core.create() for _ in range(count)]
    for session in sessions:
        core.directory.attach(session, object(), 1, core.now, number=7)
    return sessions


def offered(core, sessions, seqs, told):
    """Offers a step of each session; counts the events that came of it."""
    rows = [session.row for session in sessions]
    sink = Sink(lambda tag, seq, total: told.append((tag, seq, total)), list(range(len(rows))), seqs, 1)
    left = core.directory.offer(offer_of(core, rows, seqs, [7] * len(rows), [(1.0,)] * len(rows), sink), core.now)
    assert not len(left)
    events = core.directory.take_events()
    for event in events:
        assert isinstance(event, Declined)
        event.offer.sink.refused(event.members, event.fault)
    return [event.fault.reason_name for event in events]


def test_a_hundred_prompts_at_once_are_no_overload(busy):
    prompt = np.ones(512).tolist()
    for session in sessions_of(busy, 128):
        busy.send(session, 1, *prompt)
    assert busy.directory.take_events() == []
    assert busy.engine.queue_s > busy.directory.limits.pipeline_queue_s


def test_ten_thousand_sessions_that_wait_for_their_answers_are_no_overload(busy):
    sessions = sessions_of(busy, 10_000)
    assert offered(busy, sessions, [1] * 10_000, []) == []
    assert offered(busy, sessions, [2] * 10_000, []) == []


def test_the_third_message_is_refused_while_there_is_too_much_to_do(busy):
    told = []
    sessions = sessions_of(busy, 1000)
    assert offered(busy, sessions, [1] * 1000, told) == []
    assert offered(busy, sessions, [2] * 1000, told) == []
    assert busy.engine.queue_s == pytest.approx(2000 * TIME_STEP_S)
    newcomer = sessions_of(busy, 1)
    assert offered(busy, [*sessions, *newcomer], [3] * 1000 + [1], told) == ["OVERLOADED"]
    assert sorted(told) == [(tag, 3, None) for tag in range(1000)]
    # What was sent behind them is turned away as cheaply: one event, and no session was looked at.
    assert offered(busy, sessions, [4] * 1000, told) == ["STEP_ABORTED"]
    assert all(session._pending.maxlen == 0 for session in sessions)
    assert not busy.engine.ready > 1001


def test_refused_steps_are_taken_when_they_come_again(busy):
    told = []
    sessions = sessions_of(busy, 1000)
    for seq, reasons in ((1, []), (2, []), (3, ["OVERLOADED"]), (4, ["STEP_ABORTED"])):
        assert offered(busy, sessions, [seq] * 1000, told) == reasons
    busy.engine.run_times = RunTimes({(256, 1): 256 * TIME_STEP_S})
    while busy.run_one():
        for event in busy.directory.take_events():
            assert isinstance(event, Landed)
            event.flight.offer.sink.landed(event.members, event.outputs)
    assert busy.engine.queue_s == 0
    assert offered(busy, sessions, [3] * 1000, told) == []
    while busy.run_one():
        busy.directory.take_events()
    assert {session.applied_seq for session in sessions} == {3}


def test_a_refused_step_may_come_again_together_with_those_behind_it(busy):
    told = []
    sessions = sessions_of(busy, 1000)
    for seq, reasons in ((1, []), (2, []), (3, ["OVERLOADED"])):
        assert offered(busy, sessions, [seq] * 1000, told) == reasons
    while busy.run_one():
        busy.directory.take_events()
    one = sessions[0]
    assert offered(busy, [one, one, one], [3, 4, 5], told) == []
    while busy.run_one():
        busy.directory.take_events()
    assert one.applied_seq == 5


def test_one_by_one_the_same_holds(busy):
    session, *others = sessions_of(busy, 2001)
    for other in others:
        busy.send(other, 1, 1.0)
    tags = [busy.send(session, seq, 1.0) for seq in (1, 2, 3, 4)]
    answers = {event.reply_to: event for event in busy.directory.take_events()}
    assert [answers[tag].fault.reason_name for tag in tags[2:]] == ["OVERLOADED", "STEP_ABORTED"]
    assert answers[tags[2]].fault.retry_s > 0
    assert set(answers) == set(tags[2:])


def test_a_failing_run_leaves_no_backlog(busy):
    session = sessions_of(busy, 1)[0]
    busy.send(session, 1, SumRunner.POISON)
    busy.send(session, 2, *np.ones(100).tolist())
    busy.settle()
    assert (busy.engine.backlog.steps, busy.engine.backlog.time_steps) == (0, 0)
