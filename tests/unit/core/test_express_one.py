"""One step that nothing is before, run at once: as if it had been submitted, or not at all."""

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto.fingerprint import fingerprint
from conveyor_server.sessions.events import Answer
from conveyor_server.sessions.session import Submission
from hypothesis import given, settings

from tests.unit.core.conftest import SumRunner, next_seq
from tests.unit.core.test_express import (
    CREDITS,
    OK,
    ROUNDS,
    SESSIONS,
    Renewal,
    answers,
    bits,
    create,
    fly,
    kind,
    make,
    run_now,
    sessions_of,
    state,
    steps_of,
)

TAG = "the step"


def step_of(session, *values, seq=None, acked_seq=0, reply_to=TAG):
    """The session's next step, by whoever holds it."""
    array = np.array(values, np.float64)[:, None]
    return Submission(
        next_seq(session) if seq is None else seq,
        reply_to,
        inputs=[array],
        length=len(values),
        fingerprint=fingerprint([array]),
        epoch=session.epoch,
        acked_seq=acked_seq,
    )


def run_one_now(core, session, step):
    assert core.engine.fits(1, step.length)
    return core.directory.run_one_now(session.attachment, step, core.now)


def submit(core, session, step):
    """The same the ordinary way, as one batch."""
    core.directory.submit(session, step, core.now)
    assert core.run_one() == 1
    (answer,) = core.directory.take_events()
    assert isinstance(answer, Answer)
    assert (answer.session, answer.seq, answer.length, answer.fault) == (session, step.seq, step.length, None)
    return answer.outputs


# ---------------------------------------------------------------- as if it had been submitted


@dataclasses.dataclass(frozen=True)
class Lone:
    """A step of one session; `acked` counts from its applied seq, and may claim what was not applied."""

    which: int
    length: int
    acked: int | None
    express: bool


LONE = st.builds(
    Lone,
    which=st.sampled_from(SESSIONS),
    length=st.sampled_from([1, 1, 2, 4]),
    acked=st.none() | st.integers(-3, 3),
    # Now and then both cores submit, so that what one way leaves behind is what the other finds.
    express=st.sampled_from([True, True, True, False]),
)
HISTORIES = st.lists(
    st.one_of(LONE, LONE, LONE, LONE, ROUNDS, st.builds(Renewal, st.sampled_from(SESSIONS))), max_size=20
)


def lone_of(core, turn, values):
    (session,) = sessions_of(core, [turn.which])
    acked_seq = 0 if turn.acked is None else max(0, session.applied_seq + turn.acked)
    return session, step_of(session, *[next(values) for _ in range(turn.length)], acked_seq=acked_seq)


@settings(max_examples=300, deadline=None)
@given(timed=st.booleans(), history=HISTORIES)
def test_a_step_that_runs_at_once_leaves_behind_what_a_submitted_one_leaves(timed, history):
    express, ordinary = make(timed=timed), make(timed=timed)
    cores = (express, ordinary)
    values = [itertools.count(1.0) for _ in cores]
    for moment, turn in enumerate(history):
        for core in cores:
            core.now = float(moment)
        if isinstance(turn, Renewal):
            for core in cores:
                core.directory.close(*sessions_of(core, [turn.which]), "closing", core.now)
                core.directory.take_events()
                create(core, turn.which)
            continue
        if isinstance(turn, Lone):
            ran = (run_one_now if turn.express else submit)(express, *lone_of(express, turn, values[0]))
            expected = submit(ordinary, *lone_of(ordinary, turn, values[1]))
        else:
            here, kwargs = steps_of(express, turn, values[0])
            there, _ = steps_of(ordinary, turn, values[1])
            if not here:
                continue
            ran = (run_now if turn.express else fly)(express, here, **kwargs)
            expected = fly(ordinary, there, **kwargs)
        assert ran is not None
        assert bits(ran) == bits(expected)
        assert state(express) == state(ordinary)
        assert not express.directory.take_events()
    assert answers(express) == answers(ordinary)
    for core in cores:
        core.check_slots()


@pytest.mark.parametrize("length", [1, 3])
def test_a_step_that_ran_at_once_is_replayed_when_it_comes_again(length):
    core = make()
    session = sessions_of(core)[0]
    step = step_of(session, *[1.0] * length)
    assert run_one_now(core, session, step) is not None
    assert run_one_now(core, session, step) is None
    core.directory.submit(session, step, core.now)
    ((_, said),) = core.told(core.settle())
    assert said.totals == [11.0, 12.0, 13.0][:length]
    assert said.replayed
    assert len(core.runner.runs) == 1


@pytest.mark.parametrize("length", [1, 3])
def test_as_many_answers_as_the_credit_are_kept_of_steps_that_ran_at_once(length):
    core = make()
    for which, session in enumerate(sessions_of(core)):
        for turn in range(5):
            totals, *_ = run_one_now(core, session, step_of(session, *[1.0] * length))
            assert totals[:, 0].tolist() == [11.0 + length * turn + index for index in range(length)]
        assert session.answers.oldest_seq == 6 - CREDITS[which]


def test_outputs_that_are_kept_are_not_those_that_were_given_back():
    """Whoever is answered may do with the arrays what he likes."""
    core = make()
    session = sessions_of(core)[0]
    for array in run_one_now(core, session, step_of(session, 1.0)):
        array[...] = 0
    assert session.answers.get(1).outputs[0].tolist() == [[11.0]]


def test_a_step_that_was_refused_and_runs_at_once_is_forgotten_as_a_failure():
    core = make()
    session = sessions_of(core)[0]
    core.send(session, 1, SumRunner.OVERFLOW)
    assert core.answers()
    assert session.failed_seq == 1
    assert run_one_now(core, session, step_of(session, 1.0)) is not None
    assert (session.failed_seq, session.applied_seq) == (0, 1)


@pytest.mark.parametrize("together", [False, True], ids=["one", "many"])
def test_single_tokens_run_at_once_between_the_quanta_of_a_prompt(together):
    """Neither changes the other; steps as long as what is left of the prompt wait with it, and so does its session."""
    core = make()
    prompting, *others = sessions_of(core)
    core.send(prompting, 1, *[1.0] * 10)
    moment = 0
    while core.engine.ready:
        moment += 1
        assert core.engine.fits(len(others), 1)
        if together:
            assert run_now(core, core.items(others, 1.0)) is not None
        else:
            for session in others:
                assert run_one_now(core, session, step_of(session, 1.0)) is not None
        # The prompt goes on in quanta of 4, and a last part of 2.
        assert not core.engine.fits(1, 4 if moment < 3 else 2)
        step = step_of(prompting, 1.0, seq=2)
        assert core.directory.run_one_now(prompting.attachment, step, core.now) is None
        assert core.run_one() == 1
    ((_, said),) = core.told()
    assert said.totals == [11.0 + index for index in range(10)]
    assert [session.answers.get(3).outputs[0].tolist() for session in others] == [[[13.0]]] * len(others)
    core.check_slots()


def test_what_a_run_took_is_what_the_next_is_expected_to_take():
    core = make()
    session = sessions_of(core)[0]
    assert core.engine.run_times.expected_s(1, 1) == np.inf
    run_one_now(core, session, step_of(session, 1.0, 1.0, 1.0))
    times = core.engine.run_times
    assert 0 < times.expected_s(1, 1) <= times.expected_s(1, 4) < np.inf
    assert times.time_step_s == pytest.approx(times.expected_s(1, 4) / 3)


# ---------------------------------------------------------------- or not at all


class Amiss:
    """A session that has run, a step with something amiss, and what the ordinary way says of it."""

    def __init__(self) -> None:
        self.core = make()
        self.session = sessions_of(self.core)[2]
        for _ in range(2):
            for session in sessions_of(self.core):
                assert run_one_now(self.core, session, step_of(session, 1.0)) is not None
        self.seat = self.session.attachment
        # What comes is told apart from what has been by the time, too.
        self.core.now = 7.0

    def refuses(self, step, expected, *, seat=None) -> None:
        """Nothing moves, and then the ordinary way says so."""
        core = self.core
        before, times = state(core), dict(core.engine.run_times._run_s)
        assert core.directory.run_one_now(seat or self.seat, step, core.now) is None
        assert state(core) == before
        assert core.engine.run_times._run_s == times
        assert core.directory.take_events() == []
        core.directory.submit(self.session, step, core.now)
        if core.engine.busy:
            batch = core.engine._out
            core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
        assert kind(core.steps_told()[step.reply_to, step.seq]) == expected
        core.check_slots()


@pytest.fixture
def amiss():
    return Amiss()


@pytest.mark.parametrize(
    ("seq", "value", "expected"),
    [
        (4, 1.0, "STEP_GAP"),
        (2, 1.0, "replay"),
        (2, 5.0, "STEP_CONFLICT"),
        (1, 1.0, "replay"),
        (0, 1.0, "MESSAGE_INVALID"),
        (-1, 1.0, "MESSAGE_INVALID"),
    ],
)
def test_a_seq_that_is_not_the_next(amiss, seq, value, expected):
    amiss.refuses(step_of(amiss.session, value, seq=seq), expected)


def test_what_a_step_that_is_not_the_next_acknowledges_counts_the_ordinary_way(amiss):
    amiss.refuses(step_of(amiss.session, 1.0, seq=4, acked_seq=2), "STEP_GAP")
    assert amiss.session.answers.oldest_seq == 0


def test_a_session_that_another_stream_holds_now(amiss):
    core = amiss.core
    step = step_of(amiss.session, 1.0)
    core.directory.attach(amiss.session, "another stream", 1, core.now, number=99)
    assert core.told()
    amiss.refuses(step, "SESSION_TAKEN_OVER")


def test_a_session_that_its_stream_holds_under_another_handle_now(amiss):
    """The gate is open for the stream, and the attachment is over."""
    core = amiss.core
    step = step_of(amiss.session, 1.0)
    core.directory.attach(amiss.session, amiss.seat.owner, 2, core.now, number=amiss.seat.number)
    assert core.told()
    amiss.refuses(step, "SESSION_TAKEN_OVER")


def test_a_seat_in_a_session_of_another_stream(amiss):
    """Its number opens no gate but its own stream's."""
    stranger = dataclasses.replace(amiss.seat, number=99)
    amiss.refuses(step_of(amiss.session, 1.0), OK, seat=stranger)


@pytest.mark.parametrize("how", ["let go", "broken"])
def test_a_session_that_nobody_holds(amiss, how):
    core = amiss.core
    if how == "let go":
        core.directory.detach(amiss.seat, core.now)
    else:
        core.directory.abandon([amiss.seat], core.now)
    core.told()
    amiss.refuses(step_of(amiss.session, 1.0), OK)


def test_a_session_that_is_gone(amiss):
    core = amiss.core
    step = step_of(amiss.session, 1.0)
    core.directory.close(amiss.session, "closing", core.now)
    assert core.told()
    amiss.refuses(step, "SESSION_CLOSED")


@pytest.mark.parametrize(("closes", "expected"), [(False, OK), (True, "SESSION_CLOSED")])
def test_a_session_that_waits_for_its_last_answer(amiss, closes, expected):
    """It is still attached, and behind the step that it waits for nothing runs at once."""
    core = amiss.core
    core.send(amiss.session, 3, 1.0)
    if closes:
        core.directory.close(amiss.session, "closing", core.now)
    else:
        core.directory.detach(amiss.seat, core.now)
    assert amiss.session.attachment is amiss.seat
    amiss.refuses(step_of(amiss.session, 1.0), expected)


@pytest.mark.parametrize("seq", [3, 4])
@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("flies", [False, True])
def test_a_step_under_way(amiss, flies, runs, seq):
    """In the air or pending, waiting or running: what comes is the same step again, or the one behind it."""
    core = amiss.core
    if flies:
        assert core.offer(*core.items([amiss.session], 1.0)) == 0
    else:
        core.send(amiss.session, 3, 1.0)
    if runs:
        assert core.engine.next_batch(core.now).rows == 1
    assert not core.engine.fits(1, 1)
    amiss.refuses(step_of(amiss.session, 1.0, seq=seq), OK if seq == 4 else "replay")
    assert amiss.session.applied_seq == seq


def test_a_server_that_drains(amiss):
    amiss.core.directory.draining = True
    amiss.refuses(step_of(amiss.session, 1.0), "DRAINING")


@pytest.mark.parametrize("value", [SumRunner.POISON, SumRunner.OVERFLOW])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("acked_seq", [0, 2])
def test_a_run_that_fails_and_a_state_that_would_be_infinite(amiss, value, fresh, acked_seq):
    if fresh:
        amiss.core.directory.close(amiss.session, "closing", amiss.core.now)
        create(amiss.core, 2)
        amiss.session = sessions_of(amiss.core)[2]
        amiss.seat = amiss.session.attachment
        assert amiss.core.told()
    expected = "MODEL_FAILED" if value == SumRunner.POISON else "STATE_NON_FINITE"
    applied_seq = amiss.session.applied_seq
    amiss.refuses(step_of(amiss.session, 1.0, value, acked_seq=acked_seq), expected)
    assert amiss.session.applied_seq == applied_seq
    assert run_one_now(amiss.core, amiss.session, step_of(amiss.session, 1.0)) is not None


def test_a_run_that_breaks(amiss, monkeypatch):
    """As a defect of a runner does: what happens to it is the driver's business, on the ordinary way."""
    broken = iter([True])

    def step(run):
        amiss.core.runner.slab[run.destinations] = -1e9
        if next(broken, False):
            raise KeyError("broken")
        return original(run)

    original = amiss.core.runner.step
    monkeypatch.setattr(amiss.core.runner, "step", step)
    amiss.refuses(step_of(amiss.session, 1.0), OK)
