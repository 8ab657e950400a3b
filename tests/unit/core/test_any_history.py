"""Any history of sends, resends, cuts, cancels, failures and runs: each step counts once, and each answer is right."""

import hypothesis.strategies as st
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.sessions.events import Answer
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.core.conftest import Core, SessionLimits, SumRunner

SESSIONS = st.integers(0, 3)


class History(RuleBasedStateMachine):
    """A client that remembers what it sent; the truth is the sum of the applied steps' values."""

    @initialize()
    def begin(self):
        limits = EngineLimits(max_batch=2, quantum=3, max_batch_time_steps=6)
        self.core = Core(SessionLimits(max_sessions=4, default_in_flight=5), limits)
        self.sessions = [self.core.create() for _ in range(4)]
        self.sent = [{} for _ in self.sessions]
        self.values = 0
        self.out = None
        self.open_tags = {}

    @rule(which=SESSIONS, length=st.integers(1, 8), bad=st.sampled_from([0, 0, 0, 1, 2]), skip=st.integers(-2, 1))
    def send(self, which, length, bad, skip):
        session = self.sessions[which]
        seq = max(1, session.accepted_seq + 1 + skip)
        known = self.sent[which]
        if seq > session.accepted_seq or seq not in known:
            # Content is free until a seq is accepted; small distinct integers keep the sums exact.
            self.values += 1
            values = [float(self.values)] * length
            if bad:
                values[-1] = SumRunner.POISON if bad == 1 else SumRunner.OVERFLOW
            if seq <= session.accepted_seq:
                return
            known[seq] = values
        tag = self.core.send(session, seq, *known[seq])
        self.open_tags[tag] = (which, seq, tuple(known[seq]))

    @rule(which=SESSIONS)
    def attach(self, which):
        session = self.sessions[which]
        self.core.directory.attach(session, object(), 1, self.core.now)

    @rule(which=SESSIONS)
    def cut(self, which):
        attachment = self.sessions[which].attachment
        if attachment is not None:
            self.core.directory.abandon([attachment], self.core.now)

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

    @rule(data=st.data())
    def cancel(self, data):
        if self.open_tags:
            tag = data.draw(st.sampled_from(sorted(self.open_tags)))
            which, seq, _ = self.open_tags.pop(tag)
            self.core.directory.cancel(self.sessions[which], seq, tag)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "core"):
            return
        self.collect()
        waiting = sum(min(3, p.step.length) for s in self.sessions for p in s.pending)
        assert self.core.engine.backlog.time_steps == waiting
        for session in self.sessions:
            assert session.failed_seq in {0, session.accepted_seq + 1}

    def collect(self):
        for event in self.core.directory.take_events():
            if not isinstance(event, Answer) or event.reply_to not in self.open_tags:
                continue
            which, seq, values = self.open_tags.pop(event.reply_to)
            assert event.seq == seq
            if event.fault is not None:
                continue
            before = 10.0 + sum(sum(self.sent[which][earlier]) for earlier in range(1, seq))
            assert event.outputs[0][-1, 0] == before + sum(values)

    def teardown(self):
        if not hasattr(self, "core"):
            return
        self.deliver()
        while self.core.run_one():
            pass
        self.collect()
        assert self.open_tags == {}, "a submission was never answered"
        self.core.check_slots()
        for which, session in enumerate(self.sessions):
            truth = 10.0 + sum(sum(self.sent[which][seq]) for seq in range(1, session.applied_seq + 1))
            state = self.core.engine.read(session.lane)
            assert (10.0 if state is None else state[0][0]) == truth


History.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistory = History.TestCase
