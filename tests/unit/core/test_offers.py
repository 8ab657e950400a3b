"""Any history of offers (whole frames, turns of many streams, trains) among single steps, cuts, failures and runs.

Each step counts once, is answered once, in order, and rightly, whether it was parked behind others or not.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto.fingerprint import fingerprint
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.sessions.events import Answer, Declined, Landed
from conveyor_server.sessions.flight import Offer
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.core.conftest import Core, SessionLimits, SumRunner

SESSIONS = 4
WHICH = st.integers(0, SESSIONS - 1)


def timed_core(**limits):
    engine_limits = EngineLimits(max_batch=3, quantum=4, max_batch_time_steps=8)
    return Core(SessionLimits(max_sessions=SESSIONS, **limits), engine_limits, timed=True)


class Sink:
    """Hands what it is told to `told(tag, seq, last total or None)`."""

    def __init__(self, told, tags, seqs, train):
        self.told, self.tags, self.seqs, self.train = told, tags, seqs, train

    def landed(self, members, outputs):
        for place, member in enumerate(members.tolist()):
            totals = outputs[0][place, :, 0]
            for turn in range(self.train):
                total = totals[turn] if self.train > 1 else totals[-1]
                self.told(self.tags[member], int(self.seqs[member]) + turn, float(total))

    def refused(self, members, fault):
        for member in members.tolist():
            for turn in range(self.train):
                self.told(self.tags[member], int(self.seqs[member]) + turn, None)

    def reply_to(self, member):
        return self.tags[member]

    @property
    def kind(self):
        return Sink

    def joined(self, parts):
        tags = [sink.tags[member] for sink, members in parts for member in members.tolist()]
        seqs = [sink.seqs[member] for sink, members in parts for member in members.tolist()]
        return Sink(self.told, tags, seqs, self.train)


def print_of(values):
    return fingerprint([np.array(values, np.float64)[:, None]])


def offer_of(core, rows, seqs, holders, contents, sink, *, train=1, distinct=False, timeout_s=1e9):
    """`contents`: of each member, its time steps."""
    steps = [[(value,) for value in content] if train > 1 else [content] for content in contents]
    return Offer(
        core.engine,
        core.directory._record(core.engine),
        np.array(rows, np.int64),
        np.array(rows, np.int64),
        np.array(seqs, np.int64),
        None,
        np.array(holders, np.int64),
        np.array([[print_of(step) for step in member] for member in steps], np.uint64),
        [np.array(contents, np.float64)[:, :, None]],
        len(contents[0]),
        train,
        distinct,
        timeout_s,
        sink,
    )


class Offers(RuleBasedStateMachine):
    """Streams that send for sessions that they hold, or held; the truth is the sum of the applied steps' values."""

    @initialize()
    def begin(self):
        self.core = timed_core(default_in_flight=6)
        self.sessions = [self.core.create() for _ in range(SESSIONS)]
        self.sent = [{} for _ in self.sessions]
        self.numbers = [0] * SESSIONS
        self.streams = self.tags = self.values = 0
        self.out = None
        self.open = {}
        self.answered = [0] * SESSIONS
        for which in range(SESSIONS):
            self.attach(which)

    # ------------------------------------------------------------ what a client does

    @rule(which=WHICH)
    def attach(self, which):
        self.streams += 1
        self.numbers[which] = self.streams
        session = self.sessions[which]
        self.core.directory.attach(session, object(), 1, self.core.now, number=self.streams)
        self.collect()

    @rule(which=WHICH)
    def cut(self, which):
        attachment = self.sessions[which].attachment
        if attachment is not None:
            self.core.directory.abandon([attachment], self.core.now)

    @rule(which=st.lists(WHICH, min_size=1, max_size=6), length=st.integers(1, 3), bad=st.integers(0, 40))
    def offer(self, which, length, bad):
        self.put(which, length, 1, bad)

    @rule(which=WHICH, length=st.integers(2, 4), bad=st.integers(0, 20))
    def offer_train(self, which, length, bad):
        self.put([which], length, length, bad)

    @rule(which=WHICH, back=st.integers(0, 2), length=st.integers(1, 3))
    def send_alone(self, which, back, length):
        seq = self.accepted(which) + 1 - back
        if seq >= 1 and (back == 0 or seq in self.sent[which]):
            content = self.content(length) if back == 0 else self.sent[which][seq]
            self.submit(which, seq, content, self.tag())
            self.collect()

    # ------------------------------------------------------------ what the server does

    @rule()
    def take(self):
        if self.out is None:
            self.out = self.core.engine.next_batch(self.core.now)

    @rule()
    def deliver(self):
        if self.out is not None:
            batch, self.out = self.out, None
            self.core.directory.deliver(self.core.engine, batch, self.core.engine.run(batch), self.core.now)
            self.collect()

    @rule(seconds=st.floats(0.0, 0.6))
    def wait(self, seconds):
        self.core.now += seconds
        self.core.directory.expire(self.core.now)
        self.collect()

    # ------------------------------------------------------------ within

    def put(self, which, length, train, bad):
        seqs, contents, tags = [], [], []
        for place, session in enumerate(which):
            seqs.append(self.accepted(session) + 1 + which[:place].count(session))
            content = self.content(length)
            if bad == place:
                content[-1] = SumRunner.OVERFLOW
            elif bad == place + 20:
                content[0] = SumRunner.POISON
            contents.append(content)
            tags.append(self.tag())
            for turn in range(train):
                self.open[tags[-1], seqs[-1] + turn] = session
                self.sent[session][seqs[-1] + turn] = [content[turn]] if train > 1 else content
        rows = [self.sessions[session].row for session in which]
        holders = [self.numbers[session] for session in which]
        sink = Sink(self.told, tags, seqs, train)
        offer = offer_of(self.core, rows, seqs, holders, contents, sink, train=train, timeout_s=1.0)
        for member in self.core.directory.offer(offer, self.core.now).tolist():
            for turn in range(train):
                seq = seqs[member] + turn
                self.submit(which[member], seq, self.sent[which[member]][seq], tags[member])
        self.collect()

    def submit(self, which, seq, content, tag):
        self.open[tag, seq] = which
        self.sent[which][seq] = content
        self.core.send(self.sessions[which], seq, *content, reply_to=tag)

    def accepted(self, which):
        """As a client knows it, without looking at the session closely: that would bring its steps down."""
        session = self.sessions[which]
        return session.applied_seq + int(session.table.ahead[session.row]) + len(session._pending)

    def content(self, length):
        self.values += 1
        return [float(self.values)] * length

    def tag(self):
        self.tags += 1
        return self.tags

    def told(self, tag, seq, total):
        which = self.open.pop((tag, seq))
        if total is not None:
            assert total == 10.0 + sum(sum(self.sent[which][earlier]) for earlier in range(1, seq + 1))

    def collect(self):
        for event in self.core.directory.take_events():
            if isinstance(event, Landed):
                event.flight.offer.sink.landed(event.members, event.outputs)
            elif isinstance(event, Declined):
                event.offer.sink.refused(event.members, event.fault)
            elif isinstance(event, Answer):
                self.told(event.reply_to, event.seq, None if event.fault else float(event.outputs[0][-1, 0]))

    @invariant()
    def books_balance(self):
        if not hasattr(self, "core"):
            return
        table = self.core.directory.table
        in_flights = {session.row: 0 for session in self.sessions}
        for flight in table.flights.values():
            assert flight.waiting > 0
            here = [*flight.parked.tolist()]
            for cohort in (*flight.cohorts, *(self.out.cohorts if self.out else ())):
                if cohort.owner is flight:
                    gone = cohort.taken | cohort.claimed.keys()
                    here += [member for member in cohort.members.tolist() if member not in gone]
            assert len(set(here)) == flight.waiting
            for member in set(here):
                in_flights[int(flight.offer.rows[member])] += flight.offer.train
        assert {row: int(table.ahead[row]) for row in in_flights} == in_flights
        assert all(flight.number in table.flights for flight in table.parked.values())

    def teardown(self):
        if not hasattr(self, "core"):
            return
        self.deliver()
        while self.core.run_one():
            self.collect()
        self.collect()
        assert self.open == {}, "a step was never answered"
        assert not self.core.directory.table.flights
        assert not self.core.directory.table.parked
        self.core.check_slots()
        for which, session in enumerate(self.sessions):
            truth = 10.0 + sum(sum(self.sent[which][seq]) for seq in range(1, session.applied_seq + 1))
            state = self.core.engine.read(session.lane)
            assert (10.0 if state is None else state[0][0]) == truth


Offers.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestOffers = Offers.TestCase


@pytest.fixture
def stream():
    """A core, a session that stream 7 holds, and what its offers were answered."""
    core = timed_core(default_in_flight=3)
    session = core.create()
    core.directory.attach(session, object(), 1, 0.0, number=7)
    return core, session, []


def put(core, session, told, *seqs):
    """Offers one step of one token for each seq; returns the seqs that are left to be submitted."""
    sink = Sink(lambda tag, seq, total: told.append((seq, total)), [0] * len(seqs), list(seqs), 1)
    rows, contents = [session.row] * len(seqs), [(float(seq),) for seq in seqs]
    left = core.directory.offer(offer_of(core, rows, seqs, [7] * len(seqs), contents, sink), core.now)
    return [seqs[member] for member in left.tolist()]


def settle(core):
    batches = 0
    while core.run_one():
        batches += 1
        for event in core.directory.take_events():
            event.flight.offer.sink.landed(event.members, event.outputs)
    return batches


def test_steps_behind_one_in_the_air_are_accepted_as_arrays_and_run_in_order(stream):
    core, session, told = stream
    assert put(core, session, told, 1, 2) == []
    assert put(core, session, told, 3) == []
    assert len(session._pending) == 0
    assert settle(core) == 3
    assert told == [(1, 11.0), (2, 13.0), (3, 16.0)]
    core.check_slots()


def test_steps_in_the_air_count_against_the_credit(stream):
    core, session, told = stream
    assert put(core, session, told, 1, 2, 3, 4) == [4]
    assert settle(core) == 3
    assert put(core, session, told, 4) == []


def test_a_failed_step_aborts_those_parked_behind_it(stream):
    core, session, told = stream
    core.runner.broken = True
    put(core, session, told, 1, 2, 3)
    reasons = []
    while core.run_one():
        reasons += [(event.seq, event.fault.reason_name) for event in core.directory.take_events()]
    assert reasons == [(1, "MODEL_FAILED"), (2, "STEP_ABORTED"), (3, "STEP_ABORTED")]
    assert told == []
    core.runner.broken = False
    assert put(core, session, told, 1) == []
    assert settle(core) == 1
    core.check_slots()


def test_a_parked_step_whose_time_is_up_is_told_so(stream):
    core, session, _ = stream
    sink = Sink(None, [0, 0], [1, 2], 1)
    offer = offer_of(core, [session.row] * 2, (1, 2), (7, 7), [(1.0,), (2.0,)], sink, timeout_s=0.5)
    assert core.directory.offer(offer, 0.0).tolist() == []
    batch = core.engine.next_batch(0.0)
    core.directory.expire(0.6)
    (late,) = core.directory.take_events()
    assert (late.seq, late.fault.reason_name) == (2, "STEP_TIMEOUT")
    core.directory.deliver(core.engine, batch, core.engine.run(batch), 0.7)
    assert [event.seq for event in core.directory.take_events()] == [1]
    core.check_slots()
