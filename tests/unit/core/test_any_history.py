"""Any history of sends, resends, cuts, cancels, failures and runs: each step counts once, and each answer is right.

Runs are small, so that what went off together is split over several, and steps run while others of theirs still wait.
"""

import hypothesis.strategies as st
import numpy as np
from conveyor_server.engine.engine import EngineLimits
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.core.conftest import Core, Item, SessionLimits, SumRunner, Told, next_seq

SESSIONS = st.integers(0, 3)
QUANTUM = 3


class History(RuleBasedStateMachine):
    """A client that remembers what it sent; the truth is the sum of the applied steps' values."""

    @initialize(timed=st.booleans())
    def begin(self, timed):
        limits = EngineLimits(max_batch=2, quantum=QUANTUM, max_batch_time_steps=2 * QUANTUM)
        self.core = Core(SessionLimits(max_sessions=4, default_in_flight=5), limits, timed=timed)
        self.sessions = [self.core.hold(self.core.create()) for _ in range(4)]
        self.sent = [{} for _ in self.sessions]
        self.timed = timed
        self.values = 0
        self.out = None
        self.open_tags = {}

    @rule(which=SESSIONS, length=st.integers(1, 8), bad=st.sampled_from([0, 0, 0, 1, 2]), skip=st.integers(-2, 1))
    def send(self, which, length, bad, skip):
        session = self.sessions[which]
        following = next_seq(session)
        seq = max(1, following + skip)
        if seq < following:
            if seq in self.sent[which]:
                tag = self.core.send(session, seq, *self.sent[which][seq])
                self.open_tags[tag, seq] = (which, self.sent[which][seq])
            return
        item = self.item(which, seq, length, bad)
        self.core.send(session, seq, *item.values, reply_to=item.tag)

    @rule(chosen=st.lists(SESSIONS, min_size=1, max_size=6), length=st.integers(1, QUANTUM), bad=st.integers(-6, 6))
    def send_together(self, chosen, length, bad):
        items, behind = [], dict.fromkeys(chosen, 0)
        for index, which in enumerate(chosen):
            seq = next_seq(self.sessions[which]) + behind[which]
            behind[which] += 1
            items.append(self.item(which, seq, length, 1 + self.values % 2 if index == bad else 0))
        self.core.offer(*items)

    @precondition(lambda self: self.timed)
    @rule(which=SESSIONS, count=st.integers(2, QUANTUM), bad=st.integers(-3, 2))
    def send_a_train(self, which, count, bad):
        first = next_seq(self.sessions[which])
        tag = next(self.core._tags)
        self.core.offer(
            *(self.item(which, first + turn, 1, 2 if turn == bad else 0, tag) for turn in range(count)), train=count
        )

    @rule(which=SESSIONS)
    def attach(self, which):
        self.core.hold(self.sessions[which])

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
            tag, seq = data.draw(st.sampled_from(sorted(self.open_tags)))
            which, _ = self.open_tags.pop((tag, seq))
            self.core.directory.cancel(self.sessions[which], seq, tag)

    @rule(which=SESSIONS)
    def look(self, which):
        session = self.sessions[which]
        following = next_seq(session)
        assert [pending.seq for pending in session.pending] == list(range(session.applied_seq + 1, following))
        assert next_seq(session) == following
        assert session.failed_seq in {0, following}

    @rule()
    def check_the_books(self):
        waiting = sum(min(QUANTUM, p.step.length) for session in self.sessions for p in session.pending)
        assert self.core.engine.backlog.time_steps == waiting
        assert not self.core.directory.table.flights
        assert not self.core.directory.table.parked

    @invariant()
    def every_answer_is_right(self):
        if hasattr(self, "core"):
            self.collect()

    def item(self, which, seq, length, bad, tag=None):
        """A step that was not accepted before. Content is free until it is; small integers keep the sums exact."""
        self.values += 1
        values = [float(self.values)] * length
        if bad:
            values[-1] = SumRunner.POISON if bad == 1 else SumRunner.OVERFLOW
        session = self.sessions[which]
        self.sent[which][seq] = tuple(values)
        tag = next(self.core._tags) if tag is None else tag
        self.open_tags[tag, seq] = (which, tuple(values))
        held = session.attachment
        return Item(session, seq, values, tag, held.number if held is not None else 1 << 30, session.epoch)

    def collect(self):
        for _, told in self.core.told():
            if not isinstance(told, Told) or (told.tag, told.seq) not in self.open_tags:
                continue
            which, values = self.open_tags.pop((told.tag, told.seq))
            if told.fault is None:
                before = 10.0 + sum(sum(self.sent[which][earlier]) for earlier in range(1, told.seq))
                assert told.totals == (before + np.cumsum(values)).tolist()

    def teardown(self):
        if not hasattr(self, "core"):
            return
        self.deliver()
        while self.core.run_one():
            self.collect()
        self.collect()
        assert self.open_tags == {}, "a submission was never answered"
        self.core.check_slots()
        self.check_the_books()
        for which, session in enumerate(self.sessions):
            truth = 10.0 + sum(sum(self.sent[which][seq]) for seq in range(1, session.applied_seq + 1))
            state = self.core.engine.read(session.lane)
            assert (10.0 if state is None else state[0][0]) == truth


History.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestHistory = History.TestCase
