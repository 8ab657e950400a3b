"""Steps that nothing is before, run at once: as if they had flown, or not at all."""

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.sessions.events import Landed
from conveyor_server.sessions.limits import SessionLimits
from hypothesis import given, settings

from tests.unit.core.conftest import Core, SumRunner, Told

LIMITS = EngineLimits(max_batch=8, quantum=4, max_batch_time_steps=24)
CREDITS = (1, 2, 3, 5, 3)
SESSIONS = range(len(CREDITS))


def make(*, timed: bool = False) -> Core:
    """A core with a session of each credit, all held by one stream each."""
    core = Core(SessionLimits(max_sessions=len(CREDITS)), LIMITS, timed=timed)
    for which in SESSIONS:
        create(core, which)
    return core


def create(core, which):
    session = core.create(f"s{which}", max_in_flight=CREDITS[which])
    # The same number in every core, and never the same twice.
    core.directory.attach(session, f"stream {which}", 1, core.now, number=core.directory.opened)


def sessions_of(core, which=SESSIONS):
    return [core.directory.sessions[f"s{one}"] for one in which]


def state(core):
    """All that a step may move: the table's cells, the engine's lanes and slots, and what the sessions keep."""
    engine, slots = core.engine, core.engine.slots
    rings = {name: [answer.seq for answer in session.ring] for name, session in core.directory.sessions.items()}
    held = engine.lanes.held
    return {
        "cells": core.directory.table.cells.tolist(),
        "lanes": held.tolist(),
        "states": core.runner.slab[held[held > 0] - 1].tolist(),
        "free": slots.stack[: slots.free].tolist(),
        "rings": rings,
        "waiting": (engine.ready, engine.busy, engine.backlog.steps, engine.backlog.time_steps),
        "flights": len(core.directory.table.flights),
    }


def answers(core):
    """What a step sent again would be told, of every seq."""
    found = {}
    for session in core.directory.sessions.values():
        for seq in range(1, session.applied_seq + 3):
            answer = session.answers.get(seq)
            if answer is not None:
                found[session.id, seq] = (answer.fingerprint, answer.length, bits(answer.outputs))
        found[session.id] = session.answers.oldest_seq
    return found


def bits(outputs):
    return [(array.shape, array.tobytes()) for array in outputs]


def run_now(core, items, **kwargs):
    offer = core.offer_of(*items, **kwargs)
    assert core.engine.fits(len(offer.rows), offer.length)
    return core.directory.run_now(offer, core.now)


def fly(core, items, **kwargs):
    """The same the ordinary way, as one offer, one flight, one batch."""
    offer = core.offer_of(*items, **kwargs)
    assert len(core.directory.offer(offer, core.now)) == 0
    assert core.run_one() == len(offer.rows)
    (event,) = core.directory.take_events()
    assert isinstance(event, Landed)
    assert event.members.tolist() == list(range(len(offer.rows)))
    return event.outputs


# ---------------------------------------------------------------- as if they had flown


@dataclasses.dataclass(frozen=True)
class Round:
    """Steps of some sessions, and what the clients say of the answers that they hold.

    `acked` counts from each session's applied seq; a client that says more than was applied is not believed.
    """

    which: tuple[int, ...]
    length: int
    train: bool
    acked: tuple[int, ...] | None
    sliced: bool
    express: bool


@dataclasses.dataclass(frozen=True)
class Renewal:
    """A session is closed, and another is created in its row."""

    which: int


WHICH = st.one_of(
    st.permutations(SESSIONS).flatmap(lambda order: st.integers(1, len(order)).map(lambda count: tuple(order[:count]))),
    # Side by side, which an offer may name by a slice.
    st.tuples(st.integers(0, 4), st.integers(1, 5)).map(lambda cut: tuple(SESSIONS)[cut[0] : cut[0] + cut[1]]),
)
ROUNDS = st.builds(
    Round,
    which=WHICH,
    length=st.integers(1, 4),
    train=st.booleans(),
    acked=st.none() | st.tuples(*[st.integers(-3, 3)] * len(CREDITS)),
    sliced=st.booleans(),
    # Now and then both cores fly, so that what one way leaves behind is what the other finds.
    express=st.sampled_from([True, True, True, False]),
)
HISTORIES = st.lists(st.one_of(ROUNDS, ROUNDS, ROUNDS, st.builds(Renewal, st.sampled_from(SESSIONS))), max_size=14)


def steps_of(core, turn, values):
    """The items of a round, one for each step, and how many of them are a member's."""
    which = turn.which
    train = turn.length if core.engine.timed and turn.train else 1
    if train > 1:
        # A train beyond a session's credit is none of an offer.
        which = tuple(one for one in which if CREDITS[one] >= train)
    length = 1 if train > 1 else turn.length
    items = []
    for place, session in enumerate(sessions_of(core, which)):
        acked = max(0, session.applied_seq + turn.acked[place]) if turn.acked else 0
        for step in range(train):
            own = [next(values) for _ in range(length)]
            (item,) = core.items([session], *own, skip=step)
            items.append(dataclasses.replace(item, acked_seq=acked, tag=(session.id, item.seq)))
    return items, {"train": train, "acked": turn.acked is not None, "sliced": turn.sliced}


@settings(max_examples=300, deadline=None)
@given(timed=st.booleans(), history=HISTORIES)
def test_steps_that_run_at_once_leave_behind_what_a_flight_leaves(timed, history):
    express, flying = make(timed=timed), make(timed=timed)
    cores = (express, flying)
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
        here, kwargs = steps_of(express, turn, values[0])
        there, _ = steps_of(flying, turn, values[1])
        if not here:
            continue
        ran = (run_now if turn.express else fly)(express, here, **kwargs)
        flew = fly(flying, there, **kwargs)
        assert ran is not None
        assert bits(ran) == bits(flew)
        assert state(express) == state(flying)
        assert not express.directory.take_events()
    assert answers(express) == answers(flying)
    for core in cores:
        core.check_slots()


@pytest.mark.parametrize("length", [1, 3])
def test_a_step_that_ran_at_once_is_replayed_when_it_comes_again(length):
    core = make()
    sessions = sessions_of(core)
    items = core.items(sessions, *[1.0] * length)
    run_now(core, items)
    rows = len(core.runner.runs)
    core.offer(*items)
    said = core.told(core.settle())
    assert [what.totals for _, what in said] == [[11.0, 12.0, 13.0][:length]] * len(sessions)
    assert all(what.replayed for _, what in said)
    assert len(core.runner.runs) == rows


def test_a_step_that_was_refused_and_runs_at_once_is_forgotten_as_a_failure():
    core = make()
    session = sessions_of(core)[0]
    core.send(session, 1, SumRunner.OVERFLOW)
    (answer,) = core.answers().values()
    assert answer.fault.reason_name == "STATE_NON_FINITE"
    assert session.failed_seq == 1
    run_now(core, core.items([session], 1.0))
    assert (session.failed_seq, session.applied_seq) == (0, 1)


# ---------------------------------------------------------------- or not at all

OK = "ok"


class Amiss:
    """Sessions that have run, an offer with something amiss, and what the ordinary way says of each of its steps.

    The middle one of three is what it is about.
    """

    def __init__(self, *, timed: bool = False) -> None:
        self.core = make(timed=timed)
        self.sessions = sessions_of(self.core, [2, 3, 4])
        self.one = self.sessions[1]
        for _ in range(2):
            assert run_now(self.core, self.core.items(sessions_of(self.core), 1.0)) is not None
        # What comes is told apart from what has been by the time, too.
        self.core.now = 7.0
        self.kwargs = {}
        self.before = []

    def items(self, *values, **fields):
        """The next step of each; the middle one's with these fields."""
        items = self.core.items(self.sessions, 1.0)
        changed = self.core.items([self.one], *values) if values else items[1:2]
        return [items[0], dataclasses.replace(changed[0], **fields), items[2]]

    def refuses(self, items, *expected) -> None:
        """Nothing moves, and then the ordinary way says so."""
        core = self.core
        before = state(core)
        assert core.directory.run_now(core.offer_of(*items, **self.kwargs), core.now) is None
        assert state(core) == before
        assert core.directory.take_events() == []
        core.offer(*items, **self.kwargs)
        if core.engine.busy:
            batch = core.engine._out
            core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
        self.said = {(what.tag, what.seq): what for _, what in core.told(core.settle()) if isinstance(what, Told)}
        assert tuple(kind(self.said[item.tag, item.seq]) for item in items) == expected
        core.check_slots()


def kind(told) -> str:
    if told.fault is not None:
        return told.reason
    return "replay" if told.replayed else OK


@pytest.fixture(params=[True, False], ids=["slice", "indices"])
def amiss(request):
    made = Amiss()
    if not request.param:
        made.sessions.reverse()
        assert not isinstance(made.core.offer_of(*made.items()).where, slice)
    return made


def test_a_seq_that_is_not_the_next(amiss):
    amiss.refuses(amiss.items(seq=4), OK, "STEP_GAP", OK)


def test_a_seq_that_was_applied(amiss):
    amiss.refuses(amiss.items(seq=2), OK, "replay", OK)


def test_a_seq_that_was_applied_with_other_content(amiss):
    amiss.refuses(amiss.items(5.0, seq=2), OK, "STEP_CONFLICT", OK)


def test_acknowledgements_count_only_where_the_step_does(amiss):
    amiss.kwargs = {"acked": True}
    items = [dataclasses.replace(item, acked_seq=2) for item in amiss.items(seq=4)]
    amiss.refuses(items, OK, "STEP_GAP", OK)


def test_a_session_that_its_stream_holds_no_longer(amiss):
    items = amiss.items()
    core = amiss.core
    core.directory.attach(amiss.one, "another stream", 1, core.now, number=99)
    assert core.told()
    amiss.refuses(items, OK, "SESSION_TAKEN_OVER", OK)


def test_a_session_that_was_let_go(amiss):
    """The gate is closed; the stream's own judgement would say so, a step by itself does not have to be attached."""
    items = amiss.items(epoch=0)
    amiss.core.directory.detach(amiss.one.attachment, amiss.core.now)
    assert amiss.core.told()
    amiss.refuses(items, OK, OK, OK)


@pytest.mark.parametrize("runs", [False, True])
def test_a_step_in_the_air(amiss, runs):
    core = amiss.core
    assert core.offer(*core.items([amiss.one], 1.0)) == 0
    if runs:
        assert core.engine.next_batch(core.now).rows == 1
    assert not core.engine.fits(1, 1)
    amiss.refuses(amiss.items(), OK, OK, OK)
    assert amiss.one.applied_seq == 4


@pytest.mark.parametrize("runs", [False, True])
def test_a_step_in_the_air_that_comes_again(amiss, runs):
    core = amiss.core
    assert core.offer(*core.items([amiss.one], 1.0)) == 0
    if runs:
        assert core.engine.next_batch(core.now).rows == 1
    amiss.refuses(amiss.items(seq=3), OK, "replay", OK)
    assert amiss.one.applied_seq == 3


def test_a_step_that_waits_by_itself(amiss):
    core = amiss.core
    core.send(amiss.one, 3, 1.0)
    assert not core.engine.fits(1, 1)
    items = core.items(amiss.sessions, 1.0)
    assert [item.seq for item in items] == [3, 4, 3]
    amiss.refuses(items, OK, OK, OK)


def test_a_session_that_comes_twice(amiss):
    core = amiss.core
    items = [*amiss.items(), *core.items([amiss.one], 2.0, skip=1)]
    amiss.refuses(items, OK, OK, OK, OK)
    assert amiss.said[items[3].tag, 4].totals == [15.0]


def test_a_step_that_comes_twice(amiss):
    items = amiss.items()
    amiss.refuses([*items, *amiss.items()[1:2]], OK, OK, OK, "replay")
    assert amiss.one.applied_seq == 3


def test_a_train_beyond_the_credit():
    amiss = Amiss(timed=True)
    amiss.sessions = sessions_of(amiss.core, [2, 1])
    amiss.kwargs = {"train": 3}
    items = [item for one in amiss.sessions for turn in range(3) for item in amiss.core.items([one], 1.0, skip=turn)]
    amiss.refuses(items, OK, OK, OK, OK, OK, "CREDIT_EXCEEDED")


def test_a_server_that_drains(amiss):
    amiss.core.directory.draining = True
    amiss.refuses(amiss.items(), *["DRAINING"] * 3)


def test_a_run_that_fails(amiss):
    amiss.refuses(amiss.items(SumRunner.POISON), OK, "MODEL_FAILED", OK)
    assert run_now(amiss.core, amiss.core.items(amiss.sessions, 1.0)) is not None


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
    amiss.refuses(amiss.items(), OK, OK, OK)


def test_a_state_that_would_be_infinite(amiss):
    amiss.refuses(amiss.items(SumRunner.OVERFLOW), OK, "STATE_NON_FINITE", OK)
    assert [session.applied_seq for session in amiss.sessions] == [3, 2, 3]


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("rows", "length", "fits"),
    [(1, 1, True), (8, 1, True), (9, 1, False), (1, 4, True), (1, 5, False), (6, 4, True), (7, 4, False)],
)
def test_what_one_run_can_take_fits(rows, length, fits):
    assert make().engine.fits(rows, length) is fits


def test_nothing_fits_until_the_halves_of_a_batch_that_failed_have_run():
    core = make()
    sessions = sessions_of(core, [0, 1])
    core.offer(*core.items(sessions[:1], 1.0), *core.items(sessions[1:], SumRunner.POISON))
    while core.engine.ready or core.engine.busy:
        assert not core.engine.fits(1, 1)
        core.run_one()
    assert core.engine.fits(1, 1)
    assert len(core.runner.runs) == 3


def test_what_a_run_took_is_what_the_next_is_expected_to_take():
    core = make()
    assert core.engine.run_times.expected_s(len(CREDITS), 1) == np.inf
    run_now(core, core.items(sessions_of(core), 1.0))
    assert 0 < core.engine.run_times.expected_s(len(CREDITS), 1) < np.inf
