"""Who sent what and when: numbers go up by one, refused steps are sent again, and due steps keep their times."""

import numpy as np
import pytest
from conveyor.bench.arrivals import Arrivals
from conveyor.bench.ledger import Ledger
from conveyor.bench.spec import LoadError, LoadSpec, Pattern
from conveyor.bench.topology import Topology
from hypothesis import given, settings
from hypothesis import strategies as st


def integers(*values):
    return np.array(values, np.int64)


def test_steps_are_numbered_and_latency_counts_from_each_one_s_own_time():
    ledger = Ledger(3, 2)
    assert ledger.send(integers(0, 1, 1), integers(10, 20, 30)).tolist() == [1, 1, 2]
    assert ledger.room(integers(0, 1, 2)).tolist() == [1, 0, 2]
    # Answers of several sessions in any order, and of one session in the order of its steps.
    assert ledger.answer(integers(1, 0, 1), integers(1, 1, 2), 100).tolist() == [80, 90, 70]
    assert ledger.unanswered == 0
    assert ledger.send(integers(1, 1), 200).tolist() == [3, 4]
    assert ledger.answer(integers(1), integers(3), 205).tolist() == [5]
    assert ledger.room(integers(1)).tolist() == [1]


@pytest.mark.parametrize("seqs", [[2], [1, 1], [0], [1, 3]])
def test_an_answer_out_of_order_is_an_error(seqs):
    ledger = Ledger(2, 3)
    ledger.send(integers(0, 0, 0), 0)
    with pytest.raises(LoadError, match="was due"):
        ledger.answer(integers(*[0] * len(seqs)), integers(*seqs), 1)


def test_a_refused_step_is_sent_again_once_all_behind_it_came_back():
    ledger = Ledger(2, 4)
    ledger.send(integers(0, 0, 0, 0, 1), integers(1, 2, 3, 4, 5))
    ledger.answer(integers(0), integers(1), 10)
    assert ledger.fail(0, 2, 10) == 8
    assert ledger.room(integers(0, 1)).tolist() == [0, 3]
    ledger.fail(0, 3, 10)
    assert ledger.room(integers(0)).tolist() == [0]
    ledger.fail(0, 4, 10)
    assert ledger.room(integers(0)).tolist() == [4]
    assert ledger.unanswered == 1
    assert ledger.failing == 0
    assert ledger.send(integers(0), 20).tolist() == [2]


def test_a_refusal_may_overtake_answers_of_earlier_steps():
    ledger = Ledger(1, 3)
    ledger.send(integers(0, 0, 0), 0)
    ledger.fail(0, 3, 5)
    assert ledger.room(integers(0)).tolist() == [0]
    ledger.answer(integers(0, 0), integers(1, 2), 6)
    assert ledger.room(integers(0)).tolist() == [3]
    assert ledger.send(integers(0), 7).tolist() == [3]


def test_the_refusal_of_a_step_that_is_not_on_its_way_is_an_error():
    ledger = Ledger(1, 3)
    ledger.send(integers(0), 0)
    for seq in (0, 2):
        with pytest.raises(LoadError, match="not on its way"):
            ledger.fail(0, seq, 1)


# Whether a session has its answer by now.
BACK = st.booleans()


def open_loop(**more):
    return LoadSpec(model="m", sessions=20, pattern=Pattern.POISSON, rate_per_s=1000, in_flight=2, **more)


def test_arrivals_come_at_the_rate_at_random_and_over_all_sessions():
    arrivals = Arrivals(open_loop(), 0, np.random.default_rng(3))
    ledger = Ledger(20, 10_000)
    sessions, times = arrivals.due(int(10e9), integers(), ledger)
    assert (np.diff(sessions) >= 0).all()
    assert 9_500 < len(sessions) < 10_500
    assert np.bincount(sessions, minlength=20).min() > 400
    gaps = np.diff(np.sort(times))
    assert 0.9e6 < gaps.mean() < 1.1e6
    # Exponential: the deviation is the mean.
    assert 0.9 < gaps.std() / gaps.mean() < 1.1
    assert arrivals.next_ns > 10e9
    assert arrivals.due(int(10e9), integers(), ledger)[0].size == 0


def test_bursts_come_all_at_once():
    spec = LoadSpec(model="m", sessions=5, pattern=Pattern.BURST, rate_per_s=100, burst_s=0.25)
    arrivals = Arrivals(spec, 0, np.random.default_rng(3))
    ledger = Ledger(5, 1000)
    assert arrivals.due(249_999_999, integers(), ledger)[0].size == 0
    assert arrivals.next_ns == 250_000_000
    sessions, times = arrivals.due(510_000_000, integers(), ledger)
    assert len(sessions) == 50
    assert sorted(set(times.tolist())) == [250_000_000, 500_000_000]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_step_that_falls_due_is_sent_once_in_order_with_its_own_time(data):
    spec = open_loop(seed=data.draw(st.integers(0, 99)))
    arrivals = Arrivals(spec, 0, np.random.default_rng(spec.seed))
    everything = Arrivals(spec, 0, np.random.default_rng(spec.seed))
    ledger = Ledger(20, spec.in_flight)
    sent, now_ns = [], 0
    for _ in range(data.draw(st.integers(1, 25))):
        now_ns += data.draw(st.integers(0, 60_000_000))
        # Whoever is answered, if anyone.
        answered = [s for s in range(20) if ledger.sent[s] > ledger.applied[s] and data.draw(st.booleans())]
        ledger.answer(integers(*answered), ledger.applied[answered] + 1, now_ns)
        sessions, times = arrivals.due(now_ns, integers(*answered), ledger)
        assert (np.bincount(sessions, minlength=20) <= ledger.room(np.arange(20))).all()
        ledger.send(sessions, times)
        sent += zip(sessions.tolist(), times.tolist(), strict=True)
        assert (times <= now_ns).all()
        # What could be sent was sent.
        room = np.flatnonzero(ledger.room(np.arange(20)) > 0)
        assert (arrivals._tail[room] == arrivals._head[room]).all()
    due = list(zip(*(a.tolist() for a in everything.due(now_ns, integers(), Ledger(20, 10_000))), strict=True))
    assert len(sent) + arrivals.waiting == len(due)
    for session in range(20):
        mine = [time for s, time in sent if s == session]
        assert mine == [time for s, time in due if s == session][: len(mine)]
    left = sorted(time for s, time in due if (s, time) not in set(sent))
    assert not left or arrivals.oldest_ns() == left[0]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_step_that_finds_no_room_as_it_falls_due_is_given_up_and_all_others_are_sent(data):
    spec = open_loop(seed=data.draw(st.integers(0, 99)), shed=True)
    arrivals = Arrivals(spec, 0, np.random.default_rng(spec.seed))
    everything = Arrivals(open_loop(seed=spec.seed), 0, np.random.default_rng(spec.seed))
    ledger = Ledger(20, spec.in_flight)
    now_ns, due, sent, answered, refused = 0, 0, 0, 0, 0
    for _ in range(data.draw(st.integers(1, 25))):
        now_ns += data.draw(st.integers(0, 60_000_000))
        back = [s for s in range(20) if ledger.sent[s] > ledger.applied[s] + ledger.failed[s] and data.draw(BACK)]
        failing = [s for s in back if ledger.failed[s] or data.draw(st.booleans())]
        good = [s for s in back if s not in failing]
        ledger.answer(integers(*good), ledger.applied[good] + 1, now_ns)
        for session in failing:
            ledger.fail(session, int(ledger.applied[session] + ledger.failed[session]) + 1, now_ns)
        answered, refused = answered + len(good), refused + len(failing)
        # One by one, as they fell due, while their session has room: the first of each session's, and no more.
        room = ledger.room(np.arange(20)).tolist()
        expected = []
        for session, time in zip(*everything.due(now_ns, integers(), Ledger(20, 10_000)), strict=True):
            due += 1
            if room[session]:
                room[session] -= 1
                expected.append((session, time))
        sessions, times = arrivals.due(now_ns, integers(*back), ledger)
        assert list(zip(sessions, times, strict=True)) == expected
        ledger.send(sessions, times)
        sent += len(sessions)
        assert due == answered + refused + arrivals.waiting + arrivals.shed + ledger.unanswered
        assert (sent, arrivals.waiting) == (answered + refused + ledger.unanswered, 0)


@pytest.mark.parametrize(("sessions", "streams", "connections"), [(1, 1, 1), (10, 4, 3), (256, 256, 8), (7, 7, 7)])
def test_sessions_are_spread_evenly_and_in_order(sessions, streams, connections):
    topology = Topology.of(LoadSpec(model="m", sessions=sessions, streams=streams, connections=connections))
    assert np.ptp(np.diff(topology.first_session)) <= 1
    assert np.ptp(np.diff(topology.first_stream)) <= 1
    assert (np.diff(topology.stream) >= 0).all()
    assert (np.diff(topology.connection) >= 0).all()
    for session in range(sessions):
        stream = int(topology.stream[session])
        assert session in topology.sessions(stream)
        assert stream in topology.streams(int(topology.connection[session]))
        assert topology.session(stream, int(topology.handle[session])) == session


@pytest.mark.parametrize(
    "wrong",
    [
        {"sessions": 3, "streams": 4},
        {"sessions": 3, "streams": 2, "connections": 3},
        {"connections": 0},
        {"in_flight": 0},
        {"time_steps": 0},
        {"pattern": Pattern.POISSON},
        {"pattern": Pattern.BURST, "rate_per_s": 5, "burst_s": 0},
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\d|rate|above"):
        LoadSpec(**{"model": "m", **wrong})


def test_looks_are_spaced_where_there_is_much_to_find():
    assert open_loop().tick == 0
    busy = LoadSpec(model="m", pattern=Pattern.POISSON, rate_per_s=40_000)
    assert 1e-4 < busy.tick < 1e-3
    assert LoadSpec(model="m", pattern=Pattern.POISSON, rate_per_s=40_000, tick_s=0.5).tick == 0.5
    assert LoadSpec(model="m").tick == 0
    assert LoadSpec(model="m", sessions=64, in_flight=4).tick == 256e-6
    assert LoadSpec(model="m", sessions=10_000).tick == 0.5e-3
    assert LoadSpec(model="m", sessions=256, frames=True).tick == 0
