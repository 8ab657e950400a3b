"""Any history, told to two cores: one takes every step by itself, the other whole groups of them. All is the same.

The first is the truth: it knows nothing of offers, flights and cohorts. No bound of a run is ever reached, so that both
take the same batches, and even what depends on whether a step already runs can be compared.
"""

import contextlib
import dataclasses
from collections import defaultdict

import hypothesis.strategies as st
from conveyor_proto.reasons import Fault
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.errors import Refused
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.core.conftest import Core, Item, SessionLimits, SumRunner, Told

SESSIONS = 5
CREDIT = 3
WHICH = st.integers(0, SESSIONS - 1)
KINDS = ["next"] * 6 + ["again", "other", "skip", "stale", "overflow"]
ENTRIES = st.lists(st.tuples(WHICH, st.sampled_from(KINDS), st.integers(0, 2)), min_size=1, max_size=7)


class Twins(RuleBasedStateMachine):
    """`alone` gets steps one by one, `together` in groups; both get everything else alike."""

    @initialize(timed=st.booleans())
    def begin(self, timed):
        bounds = EngineLimits(max_batch=64, quantum=4, max_batch_time_steps=256)
        limits = SessionLimits(max_sessions=SESSIONS, default_in_flight=CREDIT, default_idle_timeout_s=50.0)
        self.alone, self.together = (Core(limits, bounds, timed=timed) for _ in range(2))
        self.cores = (self.alone, self.together)
        self.timed = timed
        self.numbers = iter(range(1, 1 << 20))
        self.values = iter(range(1, 1 << 20))
        self.names = iter(f"s{number}" for number in range(1 << 20))
        self.ids = [""] * SESSIONS
        self.out = None
        self.tags = iter(range(1 << 20))
        self.open = {}
        for which in range(SESSIONS):
            self.create(which)
            self.attach(which)

    # ------------------------------------------------------------ steps

    @rule(entries=ENTRIES, length=st.integers(1, 4), acked=st.booleans(), timeout_s=st.sampled_from([1.0, 30.0]))
    def group(self, entries, length, acked, timeout_s):
        self.submit(entries, length, acked, timeout_s)

    @rule(entries=ENTRIES, length=st.integers(1, 4), at=st.integers(0, 6))
    def group_with_one_that_fails_the_run(self, entries, length, at):
        self.deliver()
        self.submit(entries, length, False, 30.0, poisoned=at)
        self.settle()

    @rule(which=WHICH, length=st.integers(1, 9), bad=st.booleans())
    def long_step(self, which, length, bad):
        """Submitted to both, and longer than a run may be."""
        if which in self.here:
            seq = self.pair(which)[0].accepted_seq + 1
            values = [float(next(self.values))] * length
            if bad:
                values[-1] = SumRunner.OVERFLOW
            self.send_both(which, seq, values)

    @precondition(lambda self: self.timed)
    @rule(which=WHICH, count=st.integers(2, 4), bad=st.integers(-4, 3), acked=st.booleans())
    def train(self, which, count, bad, acked):
        self.deliver()
        self.settle()
        if which not in self.here or self.alone.directory.draining:
            # A train is refused as a whole.
            return
        session = self.pair(which)[0]
        rows = [[float(next(self.values))] for _ in range(count)]
        if 0 <= bad < count:
            rows[bad] = [SumRunner.OVERFLOW]
        first, tag = session.accepted_seq + 1, next(self.tags)
        fields = {"acked_seq": session.applied_seq if acked else 0}
        items = [
            [
                Item(own, first + turn, row, tag, own.attachment.number if own.attachment else 0, own.epoch, **fields)
                for turn, row in enumerate(rows)
            ]
            for own in self.pair(which)
        ]
        for item in items[0]:
            self.alone.send(item.session, item.seq, *item.values, reply_to=tag, epoch=item.epoch, **fields)
        self.together.offer(*items[1], train=count, acked=acked)
        self.settle()
        # A train is a longer run than its steps are: from here on, buckets take turns as they would have.
        self.together.engine._scheduler._turns[:] = self.alone.engine._scheduler._turns

    @rule(data=st.data())
    def cancel(self, data):
        if self.open:
            tag = data.draw(st.sampled_from(sorted(self.open)))
            which, name, seq = self.open.pop(tag)
            if self.ids[which] == name and which in self.here:
                for core, session in zip(self.cores, self.pair(which), strict=True):
                    core.directory.cancel(session, seq, tag)

    # ------------------------------------------------------------ runs

    @rule()
    def take(self):
        if self.out is None:
            batches = [core.engine.next_batch(core.now) for core in self.cores]
            assert (batches[0] is None) == (batches[1] is None)
            if batches[0] is not None:
                assert [batch.rows for batch in batches] == [batches[0].rows] * 2
                assert [batch.time_steps for batch in batches] == [batches[0].time_steps] * 2
                self.out = batches

    @rule()
    def deliver(self):
        if self.out is not None:
            out, self.out = self.out, None
            for core, batch in zip(self.cores, out, strict=True):
                core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
            self.compare()

    @rule()
    def settle(self):
        self.deliver()
        for core in self.cores:
            while core.run_one():
                pass
        self.compare()

    # ------------------------------------------------------------ sessions

    @rule(which=WHICH)
    def attach(self, which):
        number = next(self.numbers)
        if which in self.here:
            self.both(lambda core, session: core.directory.attach(session, number, 1, core.now, number=number), which)

    @rule(which=WHICH)
    def detach(self, which):
        if which in self.here and self.pair(which)[0].attachment is not None:
            self.both(lambda core, session: core.directory.detach(session.attachment, core.now), which)

    @rule(which=WHICH)
    def cut(self, which):
        if which in self.here and self.pair(which)[0].attachment is not None:
            self.both(lambda core, session: core.directory.abandon([session.attachment], core.now), which)

    @rule(which=WHICH, chance=st.integers(0, 3))
    def close(self, which, chance):
        if which in self.here and not chance:
            self.both(lambda core, session: core.directory.close(session, session.id, core.now), which)

    @rule(which=WHICH)
    def create(self, which):
        if which not in self.here:
            name = next(self.names)
            self.ids[which] = name
            for core in self.cores:
                with contextlib.suppress(Refused):
                    core.create(name)

    @rule(which=WHICH)
    def look(self, which):
        """Whoever looks at what is pending changes nothing."""
        if which in self.here:
            alone, together = self.pair(which)
            assert [pending.seq for pending in together.pending] == [pending.seq for pending in alone.pending]

    @rule(passed_s=st.sampled_from([0.3, 0.8, 20.0, 60.0]))
    def pass_time(self, passed_s):
        for core in self.cores:
            core.now += passed_s
        assert len({core.directory.expire(core.now) for core in self.cores}) == 1

    @rule(draining=st.sampled_from([False, False, True]))
    def drain(self, draining):
        for core in self.cores:
            core.directory.draining = draining

    # ------------------------------------------------------------ what must hold

    @invariant()
    def the_same(self):
        if not hasattr(self, "open"):
            return
        self.compare()
        assert self.alone.engine.backlog.time_steps == self.together.engine.backlog.time_steps
        assert self.alone.engine.ready == self.together.engine.ready
        assert list(self.alone.directory.sessions) == list(self.together.directory.sessions)
        for which in self.here:
            one, other = self.pair(which)
            for name in ("epoch", "closing", "applied_seq", "applied_time_steps", "last_used_at"):
                assert getattr(one, name) == getattr(other, name), name
            assert one.answers.oldest_seq == other.answers.oldest_seq
            states = [core.engine.read(session.lane) for core, session in zip(self.cores, (one, other), strict=True)]
            assert str(states[0]) == str(states[1])

    def compare(self):
        """What was told since the last time, session by session."""
        said = []
        for core in self.cores:
            by_session = defaultdict(list)
            for session_id, what in core.told():
                if isinstance(what, Told):
                    self.open.pop(what.tag, None)
                by_session[session_id].append(without_names(what))
            said.append(by_session)
        assert said[0] == said[1]

    def teardown(self):
        if not hasattr(self, "open"):
            return
        self.drain(False)
        self.settle()
        self.the_same()
        for which in self.here:
            assert self.pair(which)[1].failed_seq == self.pair(which)[0].failed_seq
            for core, session in zip(self.cores, self.pair(which), strict=True):
                assert not session.pending
                # The next step goes through on both, whatever was before.
                core.hold(session)
        self.compare()
        self.submit([(which, "next", 0) for which in self.here], 1, True, 30.0)
        self.settle()
        for core in self.cores:
            core.check_slots()

    # ------------------------------------------------------------ within

    @property
    def here(self):
        return [which for which, name in enumerate(self.ids) if name in self.alone.directory.sessions]

    def pair(self, which):
        return [core.directory.sessions[self.ids[which]] for core in self.cores]

    def both(self, act, which):
        refused = []
        for core, session in zip(self.cores, self.pair(which), strict=True):
            try:
                act(core, session)
                refused.append(None)
            except Refused as refusal:
                refused.append(refusal.fault)
        assert refused[0] == refused[1]

    def send_both(self, which, seq, values):
        tag = next(self.tags)
        self.open[tag] = (which, self.ids[which], seq)
        for core, session in zip(self.cores, self.pair(which), strict=True):
            core.send(session, seq, *values, reply_to=tag, timeout_s=30.0)

    def submit(self, entries, length, acked, timeout_s, poisoned=None):
        items = []
        for index, (which, kind, back) in enumerate(entries):
            if which not in self.here:
                continue
            one, other = self.pair(which)
            seq, values = one.accepted_seq + 1, [float(next(self.values))] * length
            if kind in {"again", "other"}:
                seq = max(1, seq - 1 - back)
                known = self.content(one, seq)
                if kind == "again" and known is not None and len(known) == length:
                    values = known
            elif kind == "skip":
                seq += 1 + back
            elif kind == "overflow":
                values[-1] = SumRunner.OVERFLOW
            if index == poisoned:
                values[0] = SumRunner.POISON
            tag = next(self.tags)
            self.open[tag] = (which, one.id, seq)
            holder = one.attachment.number if one.attachment is not None else 1 << 30
            epoch = one.epoch
            if kind == "stale":
                holder, epoch = 1 << 30, one.epoch - 1
            acked_seq = max(0, one.applied_seq - back) if acked else 0
            fields = {"timeout_s": timeout_s, "acked_seq": acked_seq}
            self.alone.send(one, seq, *values, reply_to=tag, epoch=epoch, **fields)
            self.remember(one, seq, values)
            items.append(Item(other, seq, values, tag, holder, epoch, acked_seq))
        if items:
            self.together.offer(*items, acked=acked, timeout_s=timeout_s)

    def content(self, session, seq):
        return self.__dict__.setdefault("contents", {}).get((session.id, seq))

    def remember(self, session, seq, values):
        """What was accepted under a seq, as the one core holds it."""
        pending = {item.seq: item for item in session.pending}
        if seq in pending:
            self.__dict__.setdefault("contents", {})[session.id, seq] = pending[seq].step.inputs[0][:, 0].tolist()


def without_names(what: object) -> object:
    """Whoever is refused among many for a reason that is none of theirs is not told whose step it was."""
    if not isinstance(what, Told) or what.fault is None or what.reason not in {"DRAINING", "STEP_ABORTED"}:
        return what
    return dataclasses.replace(what, fault=Fault(what.fault.reason, ""))


Twins.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, report_multiple_bugs=False)
TestTwins = Twins.TestCase
