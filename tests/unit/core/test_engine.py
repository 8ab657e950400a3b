"""Schedule, run, deliver: quanta, all or nothing, failures that stay alone."""

import numpy as np
import pytest
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.sessions.events import Answer


def test_sessions_of_different_lengths_share_runs_and_answers_are_their_own(core):
    sessions = [core.create() for _ in range(4)]
    tags = [core.send(session, 1, *[1.0] * length) for session, length in zip(sessions, (1, 3, 4, 9), strict=True)]
    answers = core.answers()
    for tag, length in zip(tags, (1, 3, 4, 9), strict=True):
        assert answers[tag].outputs[0][:, 0].tolist() == [11.0 + i for i in range(length)]
        assert answers[tag].outputs[1].tolist() == [10.0 + length]
        assert answers[tag].length == length
    assert max(len(run.lengths) for run in core.runner.runs) >= 2
    core.check_slots()


def test_a_long_step_runs_in_quanta_and_commits_at_the_end(core):
    session = core.create()
    core.step(session, 0.0)
    committed = session.lane.slot
    core.send(session, 2, *[1.0] * 10)
    core.run_one()
    core.run_one()
    assert session.lane.slot == committed
    assert core.engine.read(session.lane)[0].tolist() == [10.0]
    core.settle()
    assert session.lane.slot != committed
    assert [run.lengths.tolist() for run in core.runner.runs] == [[1], [4], [4], [2]]
    core.check_slots()


def test_a_long_step_that_fails_midway_moves_nothing(core):
    session = core.create()
    core.step(session, 1.0)
    tag = core.send(session, 2, *[1.0] * 5, core.runner.OVERFLOW, 1.0)
    assert core.answers()[tag].fault.reason_name == "STATE_NON_FINITE"
    assert core.step(session, 1.0) == [12.0]
    core.check_slots()


def test_one_bad_row_fails_alone_and_its_neighbours_get_their_answers(core):
    sessions = [core.create() for _ in range(4)]
    tags = [core.send(s, 1, v) for s, v in zip(sessions, (1.0, core.runner.OVERFLOW, 2.0, 3.0), strict=True)]
    answers = core.answers()
    assert len(core.runner.runs) == 1
    assert [answers[tag].fault is None for tag in tags] == [True, False, True, True]
    assert core.step(sessions[1], 5.0) == [15.0]
    core.check_slots()


def test_a_run_that_raises_is_repeated_in_halves_until_the_culprit_is_alone(core):
    sessions = [core.create() for _ in range(4)]
    core.step(sessions[2], 1.0)
    values = (1.0, 2.0, core.runner.POISON, 3.0)
    tags = [core.send(s, s.accepted_seq + 1, v) for s, v in zip(sessions, values, strict=True)]
    answers = core.answers()
    assert answers[tags[2]].fault.reason_name == "MODEL_FAILED"
    assert [answers[tag].outputs[0][0, 0] for tag in (tags[0], tags[1], tags[3])] == [11.0, 12.0, 13.0]
    assert core.step(sessions[2], 1.0) == [12.0]
    core.check_slots()


def test_a_suspect_can_neither_be_cancelled_nor_time_out_and_is_answered_once(core):
    sessions = [core.create() for _ in range(2)]
    values = (core.runner.POISON, 1.0)
    tags = [core.send(s, 1, v, timeout_s=1.0) for s, v in zip(sessions, values, strict=True)]
    core.run_one()
    core.directory.cancel(sessions[0], 1, tags[0])
    core.now = 5.0
    core.directory.expire(core.now)
    answers = [event for event in core.settle() if isinstance(event, Answer)]
    assert [answer.reply_to for answer in answers] == [tags[1]]
    assert sessions[0].failed_seq == 1
    core.check_slots()


def test_a_model_that_always_raises_answers_everyone_and_keeps_the_sessions(core):
    sessions = [core.create() for _ in range(4)]
    for session in sessions:
        core.step(session, 1.0)
    core.runner.broken = True
    tags = [core.send(session, 2, 1.0) for session in sessions]
    answers = core.answers()
    assert {answers[tag].fault.reason_name for tag in tags} == {"MODEL_FAILED"}
    core.runner.broken = False
    for session in sessions:
        assert core.step(session, 1.0) == [12.0]
    core.check_slots()


def test_half_done_steps_are_bounded_so_that_slots_never_run_out(make_core):
    core = make_core(EngineLimits(max_batch=2, quantum=4, max_batch_time_steps=8), max_sessions=16)
    sessions = [core.create() for _ in range(16)]
    for session in sessions:
        core.step(session, 0.0)
    tags = [core.send(session, 2, *[1.0] * 11) for session in sessions]
    answers = core.answers()
    assert all(answers[tag].outputs[0][-1, 0] == 21.0 for tag in tags)
    core.check_slots()


def test_short_steps_pass_between_the_quanta_of_a_long_one(core):
    long, short = core.create(), core.create()
    core.send(long, 1, *[1.0] * 40)
    core.run_one()
    tag = core.send(short, 1, 1.0)
    core.run_one()
    core.run_one()
    answered = [event.reply_to for event in core.directory.take_events()]
    assert answered == [tag]
    core.settle()


def test_answers_do_not_keep_the_batch_alive(core):
    sessions = [core.create() for _ in range(4)]
    tags = [core.send(session, 1, 1.0) for session in sessions]
    answers = core.answers()
    for tag in tags:
        for array in answers[tag].outputs:
            assert array.base is None


def test_delivering_twice_is_a_defect(core):
    core.send(core.create(), 1, 1.0)
    batch = core.engine.next_batch(core.now)
    assert core.engine.next_batch(core.now) is None
    result = core.engine.run(batch)
    core.directory.deliver(core.engine, batch, result, core.now)
    with pytest.raises(AssertionError, match="not out"):
        core.directory.deliver(core.engine, batch, result, core.now)


def test_queue_estimate_follows_the_backlog(core):
    session = core.create()
    core.step(session, 1.0)
    cost_s = core.engine.run_times.time_step_s
    assert cost_s > 0
    assert core.engine.queue_s == 0
    core.send(session, 2, *np.ones(3).tolist())
    assert core.engine.queue_s == pytest.approx(3 * cost_s)
    # One quantum: then others are served before it goes on.
    core.send(core.create(), 1, *np.ones(10).tolist())
    assert core.engine.queue_s == pytest.approx((3 + 4) * cost_s)
