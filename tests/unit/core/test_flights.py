"""Steps that were accepted together: every way in which one of them comes to be looked at by itself.

Each way is tried while the step waits for a run and while it runs; its neighbours never notice.
"""

import pytest
from conveyor_proto.v1 import session_pb2
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.sessions.session import Session

from tests.unit.core.conftest import Told

LIMITS = EngineLimits(max_batch=8, quantum=4, max_batch_time_steps=32)


@pytest.fixture
def core(make_core):
    return make_core(LIMITS, max_sessions=16, default_in_flight=4)


@pytest.fixture
def timed(make_core):
    """Of a model whose tensors all have time, which trains need."""
    return make_core(LIMITS, timed=True, max_sessions=16, default_in_flight=4)


@pytest.fixture(params=["waits", "runs"])
def stage(request):
    return request.param


class Group:
    """Three sessions whose first steps are in the air; the middle one is what the test is about."""

    def __init__(self, core, stage: str, *, timeout_s: float = 30.0) -> None:
        self.core = core
        self.sessions: list[Session] = [core.hold(core.create(f"s{row}")) for row in range(3)]
        self.one = self.sessions[1]
        self.items = core.items(self.sessions, 1.0)
        assert core.offer(*self.items, timeout_s=timeout_s) == 0
        self.batch = core.engine.next_batch(core.now) if stage == "runs" else None
        assert core.directory.table.flight[[session.row for session in self.sessions]].all()

    def deliver(self) -> None:
        if self.batch is not None:
            self.core.directory.deliver(self.core.engine, self.batch, self.core.engine.run(self.batch), self.core.now)

    def settle(self) -> list[tuple[str, object]]:
        """What is told from here on; of the neighbours nothing but their answers."""
        self.deliver()
        said = self.core.told(self.core.settle())
        for neighbour in (self.sessions[0], self.sessions[2]):
            told = [what for name, what in said if name == neighbour.id]
            assert [what.totals for what in told] == [[11.0]]
            assert neighbour.applied_seq == 1
        return [what for name, what in said if name == self.one.id]


def kinds(said) -> list[str]:
    """ok, replay, a reason, or what else was said."""
    return [
        ("replay" if what.replayed else "ok" if what.fault is None else what.reason)
        if isinstance(what, Told)
        else what[0]
        for what in said
    ]


def test_untouched_they_land_as_they_went_off(core, stage):
    group = Group(core, stage)
    assert kinds(group.settle()) == ["ok"]
    assert len(core.runner.runs) == 1
    assert not core.directory.table.flights
    core.check_slots()


def test_sent_again_it_is_answered_twice_and_applied_once(core, stage):
    group = Group(core, stage)
    core.send(group.one, 1, 1.0)
    assert kinds(group.settle()) == ["ok", "replay"]
    assert group.one.applied_seq == 1
    core.check_slots()


def test_sent_again_with_other_content_is_a_conflict(core, stage):
    group = Group(core, stage)
    core.send(group.one, 1, 2.0)
    assert kinds(group.settle()) == ["STEP_CONFLICT", "ok"]


def test_the_next_one_follows_it(core, stage):
    group = Group(core, stage)
    core.send(group.one, 2, 2.0)
    assert [what.totals for what in group.settle()] == [[11.0], [13.0]]


def test_a_gap_behind_it_is_one(core, stage):
    group = Group(core, stage)
    core.send(group.one, 3, 2.0)
    said = group.settle()
    assert kinds(said) == ["STEP_GAP", "ok"]
    assert said[0].fault.metadata["next_seq"] == "2"


def test_steps_behind_it_count_for_the_credit(core, stage):
    group = Group(core, stage)
    for seq in range(2, 6):
        core.send(group.one, seq, 1.0)
    assert kinds(group.settle()) == ["CREDIT_EXCEEDED", "ok", "ok", "ok", "ok"]


def test_detach_waits_for_its_answer(core, stage):
    group = Group(core, stage)
    core.directory.detach(group.one.attachment, core.now)
    said = group.settle()
    assert kinds(said) == ["ok", "detached"]
    assert said[1][2:] == (session_pb2.DETACH_CAUSE_DETACHED, 1)


def test_close_waits_for_its_answer_and_frees_the_state(core, stage):
    group = Group(core, stage)
    core.directory.close(group.one, group.one.id, core.now)
    assert kinds(group.settle()) == ["ok", "detached", "closed"]
    assert group.one.id not in core.directory.sessions
    core.check_slots()


def test_a_take_over_aborts_what_waits_and_lets_what_runs_finish(core, stage):
    group = Group(core, stage)
    core.hold(group.one)
    said = group.settle()
    if stage == "waits":
        assert kinds(said) == ["SESSION_TAKEN_OVER", "detached"]
        assert group.one.applied_seq == 0
    else:
        # The former holder is told that it is one; the answer that follows is for the transport to drop.
        assert kinds(said) == ["detached", "ok"]
        assert group.one.applied_seq == 1
    assert core.offer(*core.items([group.one], 1.0)) == 0
    assert kinds([what for name, what in core.told(core.settle()) if name == group.one.id]) == ["ok"]
    core.check_slots()


def test_a_stream_that_breaks_leaves_it_to_be_applied_and_kept(core, stage):
    group = Group(core, stage)
    core.directory.abandon([session.attachment for session in group.sessions], core.now)
    assert kinds(group.settle()) == ["ok"]
    core.hold(group.one)
    tag = core.send(group.one, 1, 1.0)
    assert core.steps_told()[tag, 1].replayed


def test_cancelled_it_moves_nothing_unless_it_runs(core, stage):
    group = Group(core, stage)
    core.directory.cancel(group.one, 1, group.items[1].tag)
    assert group.settle() == []
    assert group.one.applied_seq == (1 if stage == "runs" else 0)
    core.check_slots()


def test_it_times_out_unless_it_runs(core, stage):
    group = Group(core, stage, timeout_s=0.5)
    assert core.directory.next_expiry_at() <= 0.5
    core.now = 0.6
    core.directory.expire(core.now)
    group.deliver()
    said = core.told(core.settle())
    assert kinds(what for _, what in said) == (["ok"] * 3 if stage == "runs" else ["STEP_TIMEOUT"] * 3)
    assert all(session.failed_seq == (0 if stage == "runs" else 1) for session in group.sessions)
    assert core.offer(*core.items(group.sessions, 5.0)) == 0
    assert kinds(what for _, what in core.told(core.settle())) == ["ok"] * 3
    core.check_slots()


def test_it_times_out_although_somebody_looked_at_it(core):
    group = Group(core, "waits", timeout_s=0.5)
    assert len(group.one.pending) == 1
    core.now = 0.6
    core.directory.expire(core.now)
    assert kinds(what for _, what in core.told()) == ["STEP_TIMEOUT"] * 3


def test_an_unloaded_model_aborts_what_waits(core, stage):
    group = Group(core, stage)
    core.directory.close_all(core.engine, session_pb2.DETACH_CAUSE_MODEL_UNLOADED, core.now)
    group.deliver()
    said = core.told(core.settle())
    assert sorted(kinds(what for _, what in said)) == sorted(
        [*(["ok"] * 3 if stage == "runs" else ["SESSION_CLOSED"] * 3), *["detached"] * 3]
    )
    assert not core.directory.sessions
    core.check_slots()


def test_a_session_with_a_step_in_the_air_is_not_idle(make_core):
    core = make_core(LIMITS, max_sessions=16, default_idle_timeout_s=10.0)
    group = Group(core, "waits", timeout_s=1000.0)
    core.now = 50.0
    assert core.directory.expire(core.now) == 0
    assert kinds(group.settle()) == ["ok"]


def test_a_run_that_fails_is_told_to_the_culprit_alone(core):
    sessions = [core.hold(core.create(f"s{row}")) for row in range(4)]
    items = [
        item
        for session, value in zip(sessions, (1.0, core.runner.POISON, core.runner.OVERFLOW, 4.0), strict=True)
        for item in core.items([session], value)
    ]
    assert core.offer(*items) == 0
    said = core.told(core.settle())
    assert {name: kinds([what])[0] for name, what in said} == {
        "s0": "ok",
        "s1": "MODEL_FAILED",
        "s2": "STATE_NON_FINITE",
        "s3": "ok",
    }
    assert core.offer(*core.items(sessions, 1.0)) == 0
    assert sorted(what.totals[0] for _, what in core.told(core.settle())) == [11.0, 11.0, 12.0, 15.0]
    core.check_slots()


# ---------------------------------------------------------------- what is accepted


def test_what_is_not_next_of_an_idle_session_is_left(core):
    fresh, cut, closing, stale, ahead = (core.hold(core.create(f"s{row}")) for row in range(5))
    items = core.items([fresh, cut, closing, stale, ahead], 1.0, seq=1)
    core.directory.abandon([cut.attachment], core.now)
    core.send(closing, 1, 1.0)
    core.directory.close(closing, None, core.now)
    core.hold(stale)
    core.told()
    items[4] = core.items([ahead], 1.0, seq=3)[0]
    assert core.offer(*items) == 4
    said = {name: kinds([what])[0] for name, what in core.told(core.settle()) if isinstance(what, Told)}
    # Those that are left are judged alone: a step of a stream that broke is still applied.
    assert said == {"s0": "ok", "s1": "ok", "s2": "ok", "s3": "SESSION_TAKEN_OVER", "s4": "STEP_GAP"}


def test_more_than_the_model_can_do_is_refused_together(core):
    sessions = [core.hold(core.create(f"s{row}")) for row in range(3)]
    core.directory.draining = True
    assert core.offer(*core.items(sessions, 1.0)) == 0
    assert kinds(what for _, what in core.told()) == ["DRAINING"] * 3
    assert [session.failed_seq for session in sessions] == [1, 1, 1]
    # Behind a refused step nothing is accepted until that comes again.
    assert core.offer(*core.items(sessions, 1.0, skip=1)) == 0
    assert kinds(what for _, what in core.told()) == ["STEP_ABORTED"] * 3
    core.directory.draining = False
    assert core.offer(*core.items(sessions, 1.0)) == 0
    assert kinds(what for _, what in core.told(core.settle())) == ["ok"] * 3


def test_a_session_twice_in_an_offer_takes_its_steps_in_order(core):
    session = core.hold(core.create())
    first, second = core.items([session], 1.0)[0], core.items([session], 2.0, skip=1)[0]
    assert core.offer(first, second) == 0
    assert [what.totals for _, what in core.told(core.settle())] == [[11.0], [13.0]]
    later, earlier = core.items([session], 2.0, skip=1)[0], core.items([session], 1.0)[0]
    assert core.offer(later, earlier) == 2
    assert kinds(what for _, what in core.told(core.settle())) == ["STEP_GAP", "ok"]


# ---------------------------------------------------------------- trains


def train(core, session, *values):
    """An offer of the session's next steps, a time step each; returns how many members were left."""
    items = [core.items([session], value, skip=turn)[0] for turn, value in enumerate(values)]
    return core.offer(*items, train=len(values))


def test_a_train_runs_as_one_and_is_bit_equal_to_steps_one_by_one(timed):
    values = (0.1, 0.2, 0.3, 1e-9)
    session, other = (timed.hold(timed.create()) for _ in range(2))
    assert train(timed, session, *values) == 0
    assert timed.run_one() == 1
    together = [what for _, what in timed.told()]
    one_by_one = [timed.send(other, seq, value) for seq, value in enumerate(values, 1)]
    alone = timed.steps_told()
    assert [what.outputs for what in together] == [alone[tag, seq].outputs for seq, tag in enumerate(one_by_one, 1)]
    assert [what.seq for what in together] == [1, 2, 3, 4]
    assert [what.length for what in together] == [1, 1, 1, 1]
    assert (session.applied_seq, session.applied_time_steps) == (4, 4)
    assert session.answers.oldest_seq == other.answers.oldest_seq == 1
    # Each of its steps is kept as one, and can be asked for again.
    tags = [timed.send(session, seq, value) for seq, value in enumerate(values, 1)]
    again = timed.steps_told()
    assert [again[tag, seq].outputs for seq, tag in enumerate(tags, 1)] == [what.outputs for what in together]
    assert all(again[tag, seq].replayed for seq, tag in enumerate(tags, 1))


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_step_of_a_train_that_fails_stops_those_behind_it_alone(timed, bad):
    session = timed.hold(timed.create())
    values = [1.0] * 4
    values[bad] = timed.runner.OVERFLOW
    assert train(timed, session, *values) == 0
    said = [what for _, what in timed.told(timed.settle())]
    assert kinds(said) == ["ok"] * bad + ["STATE_NON_FINITE"] + ["STEP_ABORTED"] * (3 - bad)
    assert (session.applied_seq, session.failed_seq) == (bad, bad + 1)
    assert train(timed, session, 5.0, 1.0) == 0
    assert [what.totals[0] for _, what in timed.told(timed.settle())] == [15.0 + bad, 16.0 + bad]
    timed.check_slots()


def test_a_train_whose_run_raises_moves_nothing_from_the_culprit_on(timed):
    session, neighbour = (timed.hold(timed.create()) for _ in range(2))
    assert train(timed, session, 1.0, timed.runner.POISON, 1.0) == 0
    timed.send(neighbour, 1, 7.0, 7.0, 7.0)
    said = timed.told(timed.settle())
    assert kinds(what for name, what in said if name == session.id) == ["ok", "MODEL_FAILED", "STEP_ABORTED"]
    assert kinds(what for name, what in said if name == neighbour.id) == ["ok"]
    timed.check_slots()


def test_a_train_over_the_credit_is_left(timed):
    session = timed.hold(timed.create(max_in_flight=2))
    assert train(timed, session, 1.0, 1.0, 1.0) == 1
    assert kinds(what for _, what in timed.told(timed.settle())) == ["CREDIT_EXCEEDED", "ok", "ok"]


def test_a_train_that_was_asked_about_comes_apart_while_it_waits(timed):
    session = timed.hold(timed.create())
    train(timed, session, 1.0, 2.0, 3.0)
    assert [pending.seq for pending in session.pending] == [1, 2, 3]
    tag = timed.send(session, 2, 2.0)
    steps = timed.steps_told()
    assert steps[tag, 2].replayed
    assert [told.totals[0] for told in sorted(steps.values(), key=lambda told: told.seq)] == [11.0, 13.0, 13.0, 16.0]
    timed.check_slots()


def test_a_train_that_was_asked_about_stays_whole_while_it_runs(timed):
    session = timed.hold(timed.create())
    train(timed, session, 1.0, 2.0, 3.0)
    batch = timed.engine.next_batch(timed.now)
    assert [pending.seq for pending in session.pending] == [1, 2, 3]
    conflict, behind = timed.send(session, 2, 9.0), timed.send(session, 4, 4.0)
    for seq in (1, 2, 3):
        timed.directory.cancel(session, seq, "nobody")
    timed.directory.deliver(timed.engine, batch, timed.engine.run(batch), timed.now)
    steps = timed.steps_told()
    assert steps[conflict, 2].reason == "STEP_CONFLICT"
    assert steps[behind, 4].totals == [20.0]
    assert session.applied_seq == 4
    assert len(timed.runner.runs) == 2
    timed.check_slots()


def test_a_take_over_while_a_train_runs_lets_all_of_it_finish(timed):
    session = timed.hold(timed.create())
    train(timed, session, 1.0, 2.0)
    batch = timed.engine.next_batch(timed.now)
    timed.send(session, 3, 3.0)
    timed.hold(session)
    assert kinds(what for _, what in timed.told()) == ["SESSION_TAKEN_OVER", "detached"]
    timed.directory.deliver(timed.engine, batch, timed.engine.run(batch), timed.now)
    assert kinds(what for _, what in timed.told()) == ["ok", "ok"]
    assert (session.applied_seq, session.failed_seq) == (2, 0)
    timed.check_slots()


# ---------------------------------------------------------------- one behind the other


def test_offers_behind_each_other_run_one_after_the_other(core):
    sessions = [core.hold(core.create(f"s{row}")) for row in range(3)]
    table = core.directory.table
    for value in (1.0, 2.0, 3.0):
        assert core.offer(*core.items(sessions, value)) == 0
    assert table.ahead[[session.row for session in sessions]].tolist() == [3, 3, 3]
    said = core.told(core.settle())
    for session in sessions:
        assert [what.totals for name, what in said if name == session.id] == [[11.0], [13.0], [16.0]]
    assert [len(run.lengths) for run in core.runner.runs] == [3, 3, 3]
    assert not table.flights
    assert not table.parked
    core.check_slots()


def test_the_credit_bounds_offers_behind_each_other(core):
    session = core.hold(core.create())
    assert [core.offer(*core.items([session], 1.0)) for _ in range(4)] == [0] * 4
    assert core.offer(*core.items([session], 1.0)) == 1
    assert kinds(what for _, what in core.told(core.settle())) == ["CREDIT_EXCEEDED", *["ok"] * 4]
    core.check_slots()


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_of_several_in_the_air_all_come_down_together(core, stage, seq):
    sessions = [core.hold(core.create(f"s{row}")) for row in range(2)]
    for value in (1.0, 2.0, 3.0):
        core.offer(*core.items(sessions, value))
    batch = core.engine.next_batch(core.now) if stage == "runs" else None
    core.send(sessions[0], seq, float(seq))
    assert [pending.seq for pending in sessions[0].pending] == [1, 2, 3]
    if batch is not None:
        core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    said = core.told(core.settle())
    mine = [what for name, what in said if name == "s0"]
    assert sorted((what.seq, what.totals[0]) for what in mine if not what.replayed) == [(1, 11.0), (2, 13.0), (3, 16.0)]
    assert [what.seq for what in mine if what.replayed] == [seq]
    assert [what.totals for name, what in said if name == "s1"] == [[11.0], [13.0], [16.0]]
    core.check_slots()


def test_one_that_fails_aborts_those_behind_it_of_its_session_alone(core):
    sessions = [core.hold(core.create(f"s{row}")) for row in range(2)]
    first = [
        core.items([session], value)[0] for session, value in zip(sessions, (core.runner.OVERFLOW, 1.0), strict=True)
    ]
    core.offer(*first)
    core.offer(*core.items(sessions, 2.0))
    core.offer(*core.items(sessions, 3.0))
    said = core.told(core.settle())
    assert kinds(what for name, what in said if name == "s0") == ["STATE_NON_FINITE", "STEP_ABORTED", "STEP_ABORTED"]
    assert [what.totals for name, what in said if name == "s1"] == [[11.0], [13.0], [16.0]]
    core.check_slots()


def test_a_take_over_aborts_all_that_wait_behind_the_one_that_runs(core):
    session = core.hold(core.create())
    for value in (1.0, 2.0, 3.0):
        core.offer(*core.items([session], value))
    batch = core.engine.next_batch(core.now)
    core.hold(session)
    assert kinds(what for _, what in core.told()) == ["SESSION_TAKEN_OVER", "SESSION_TAKEN_OVER", "detached"]
    core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    assert kinds(what for _, what in core.told()) == ["ok"]
    assert core.offer(*core.items([session], 2.0)) == 0
    assert [what.totals for _, what in core.told(core.settle())] == [[13.0]]
    core.check_slots()


def test_those_behind_time_out_too(core):
    session = core.hold(core.create())
    core.offer(*core.items([session], 1.0), timeout_s=30.0)
    core.offer(*core.items([session], 2.0), timeout_s=0.5)
    core.offer(*core.items([session], 3.0), timeout_s=30.0)
    batch = core.engine.next_batch(core.now)
    core.now = 1.0
    core.directory.expire(core.now)
    assert kinds(what for _, what in core.told()) == ["STEP_TIMEOUT", "STEP_ABORTED"]
    core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    assert kinds(what for _, what in core.told()) == ["ok"]
    core.check_slots()
