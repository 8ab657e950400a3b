"""Replicas that share a store are, to whoever uses a session, one server that does one thing at a time.

Whatever the order in which replicas, their stores, their models, crashes and clients have their turns: what clients of
a SYNC session are told has a linearisation, and so has what clients of an ASYNC session are told while they use it on
one replica that lives and is told what its store did. (What else an ASYNC session promises, the fault suite shows with
real processes: a server that is not told of its own attach is fenced by it, and the client sends again what was not
durable.)

The examples are the same each time; EXAMPLES=5000 in the environment draws so many others.
"""

import os
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from callers import Caller, History
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.store.contract import Outcome
from conveyor_server.store.memory import MemoryStore
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from linear import DONE, FENCED, FRESH, GONE, Operation, Result, is_linearisable
from replicas import Births, Clock, Replica

CALLER, REPLICA, SESSION = (
    st.integers(0, 1),
    st.runner().flatmap(lambda self: st.sampled_from(range(self.replica_count))),
    st.sampled_from("ab"),
)
TROUBLE = st.runner().flatmap(lambda self: st.sampled_from(self.troubles))
# Of one session. Longer histories find no more, and take longer to judge.
MOST = 18
# More rounds than anything takes that waits for the store, when that is there.
MANY_ROUNDS = 60


class World(RuleBasedStateMachine):
    """Replicas, two callers, two sessions."""

    durability = pb.DURABILITY_SYNC
    replica_count = 2
    store_of = MemoryStore
    hasty = False
    troubles = ("", "", "", "away", "mute")

    @initialize(at_once=st.booleans(), max_sessions=st.sampled_from([1, 8]))
    def begin(self, at_once, max_sessions):
        self.clock = Clock()
        self.inner = Births(self.store_of(lambda: self.clock.now))
        self.kind = {"at_once": at_once, "max_sessions": max_sessions, "hasty": self.hasty}
        self.replicas = [self.start() for _ in range(self.replica_count)]
        self.history = History()
        self.callers = [Caller(self.history, self.durability) for _ in range(2)]
        self.values = 0

    def start(self):
        return Replica(self.clock, self.inner, **self.kind)

    # ------------------------------------------------------------ callers

    @rule(c=CALLER, r=REPLICA, s=SESSION, settle=st.booleans())
    def create(self, c, r, s, settle):
        if self.has_room(s):
            self.callers[c].create(self.replicas[r], s)
            self.after(r, settle)

    @rule(c=CALLER, r=REPLICA, s=SESSION, guarded=st.booleans(), settle=st.booleans())
    def resume(self, c, r, s, guarded, settle):
        if self.has_room(s):
            self.callers[c].resume(self.replicas[r], s, guarded=guarded)
            self.after(r, settle)

    @rule(data=st.data(), skip=st.sampled_from([0, 0, 0, 0, -1, -2, 1]), other=st.booleans(), settle=st.booleans())
    @precondition(lambda self: self.seats())
    def step(self, data, skip, other, settle):
        caller, replica, seat = data.draw(st.sampled_from(self.seats()))
        seq = max([seat.applied, *seat.open]) + 1 + skip
        if seq < 1 or seq in seat.open or not self.has_room(seat.session_id):
            return
        x = seat.sent.get(seq)
        if x is None or (other and skip < 0):
            x = self.value(seat.session_id, seq, again=skip < 0 and not other)
        caller.step(replica, seat, seq, x)
        self.after(self.replicas.index(replica), settle)

    @rule(data=st.data(), settle=st.booleans(), what=st.sampled_from(["close", "detach", "detach", "flush"]))
    @precondition(lambda self: self.seats())
    def leave(self, data, settle, what):
        caller, replica, seat = data.draw(st.sampled_from(self.seats()))
        if self.has_room(seat.session_id):
            getattr(caller, what)(replica, seat)
            self.after(self.replicas.index(replica), settle)

    @rule(c=CALLER, r=REPLICA, s=SESSION, skip=st.integers(0, 1), settle=st.booleans())
    def step_alone(self, c, r, s, skip, settle):
        if self.has_room(s):
            seq = 1 + skip + sum(1 for op in self.history.operations.get(s, ()) if op.kind == "step" and op.result)
            self.callers[c].step_alone(self.replicas[r], s, seq, self.value(s, seq))
            self.after(r, settle)

    @rule(c=CALLER, r=REPLICA, s=SESSION, settle=st.booleans())
    def close_alone(self, c, r, s, settle):
        if self.has_room(s):
            self.callers[c].close_alone(self.replicas[r], s)
            self.after(r, settle)

    # ------------------------------------------------------------ replicas

    @rule(r=REPLICA)
    def turn(self, r):
        self.after(r, settle=False)

    @rule(r=REPLICA, trouble=TROUBLE)
    @precondition(lambda self: any(replica.store_thread for replica in self.replicas))
    def visit(self, r, trouble):
        if self.replicas[r].store_thread:
            self.replicas[r].visit(trouble)

    @rule(r=REPLICA)
    @precondition(lambda self: any(replica.engine_thread for replica in self.replicas))
    def run(self, r):
        if self.replicas[r].engine_thread:
            self.replicas[r].run()

    @rule(r=REPLICA)
    def settle(self, r):
        self.after(r, settle=True)

    @rule(r=REPLICA)
    @precondition(lambda self: self.durability == pb.DURABILITY_SYNC)
    def crash(self, r):
        replica, self.replicas[r] = self.replicas[r], self.start()
        replica.crash()
        for caller in self.callers:
            caller.forget(replica)

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.3, 3.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    # ------------------------------------------------------------ within

    def seats(self):
        """Of all callers, those that can be used."""
        return [
            (caller, replica, seat)
            for caller in self.callers
            for (replica, _), seat in caller.seats.items()
            if not seat.leaving
        ]

    def has_room(self, session_id):
        return len(self.history.operations.get(session_id, ())) < MOST

    def value(self, session_id, seq, *, again=False):
        """Of a step: one that was sent as that before, or a new one; sums of different ones differ."""
        known = [op.x for op in self.history.operations.get(session_id, ()) if op.kind == "step" and op.seq == seq]
        if again and known:
            return known[0]
        self.values += 1
        return float(2**self.values)

    def after(self, r, settle):
        """A replica has its turn, and where it is to settle, its threads theirs, until nothing is left to do."""
        replica = self.replicas[r]
        replica.turn()
        while settle and (replica.store_thread or replica.engine_thread):
            if replica.engine_thread:
                replica.run()
            else:
                replica.visit()
            replica.turn()
        for caller in self.callers:
            caller.read(replica)

    def end_well(self):
        """The store is there, and time passes: all is answered."""
        for _ in range(MANY_ROUNDS):
            for r in range(len(self.replicas)):
                self.after(r, settle=True)
            self.clock.now += 0.1
        assert not any(caller.waits for caller in self.callers), "somebody was not answered"
        assert not any(replica.waits for replica in self.replicas), "a call was not answered"

    def look(self):
        """Finds out what each session has become."""
        for r in range(len(self.replicas)):
            self.crash(r)
        for s in list(self.history.operations):
            caller = self.callers[0]
            caller.resume(self.replicas[0], s, guarded=False)
            self.after(0, settle=True)
            for _, replica, seat in self.seats():
                if seat.session_id == s:
                    caller.step(replica, seat, seat.applied + 1, self.value(s, seat.applied + 1))
            self.after(0, settle=True)

    def check(self):
        for session_id, operations in self.history.operations.items():
            births = self.inner.first_epochs.get(session_id, [])
            assert is_linearisable(operations, births), "\n".join([f"session {session_id}:", *map(str, operations)])

    def teardown(self):
        if not hasattr(self, "history"):
            return
        try:
            self.end_well()
            self.look()
            self.check()
        finally:
            for replica in self.replicas:
                replica.crash()


class Usual(World):
    """Sessions that are written behind their answers, on one replica."""

    durability = pb.DURABILITY_ASYNC
    replica_count = 1
    troubles = ("", "", "", "away")


class Hasty(World):
    """Answers leave before the store has what they tell of."""

    hasty = True


class Unfenced(MemoryStore):
    """Whoever has lost a session can write it still."""

    def put(self, checkpoint):
        epochs = [record.epoch for record in self.load([(name, 0) for name in checkpoint.session_ids])]
        return super().put(replace(checkpoint, epochs=epochs))


class Torn(World):
    """A store without the fence."""

    store_of = Unfenced


class Forgetful(MemoryStore):
    """A write that was acknowledged is lost."""

    def put(self, checkpoint):
        return [Outcome.DONE] * len(checkpoint.session_ids)


class Lossy(World):
    """A store that keeps what was created, and nothing more."""

    store_of = Forgetful


def times(examples, *phases):
    """The same ones each time; with EXAMPLES=5000 in the environment, as many others."""
    others = int(os.environ.get("EXAMPLES", "0"))
    return settings(
        max_examples=others or examples,
        derandomize=not others,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases or tuple(Phase),
    )


TestSync, TestAsync = World.TestCase, Usual.TestCase
TestSync.settings, TestAsync.settings = times(200), times(100)


@pytest.mark.parametrize("wrong", [Hasty, Torn, Lossy])
def test_a_server_or_store_that_does_not_do_what_it_must_is_found_out(wrong):
    with pytest.raises(AssertionError, match=r"session [ab]:"):
        run_state_machine_as_test(wrong, settings=times(1000, Phase.generate))


# ---------------------------------------------------------------- the judge


def told(kind, called, answered, result, **fields):
    return Operation(kind, called, answered=answered, result=result, **fields)


def test_a_history_is_judged_by_what_its_answers_say():
    made = told("create", 1, 2, Result(DONE, epoch=7))
    step = told("step", 3, 4, Result(DONE, total=FRESH + 2), holder=made, seq=1, x=2.0)
    again = told("step", 5, 6, Result(DONE, total=FRESH + 2), holder=made, seq=1, x=2.0)
    taken = told("resume", 7, 8, Result(DONE, epoch=8, applied=1))
    late = told("step", 9, 10, Result(FENCED), holder=made, seq=2, x=4.0)
    gone = told("resume", 11, 12, Result(GONE))
    assert is_linearisable([made, step, again, taken, late], [7])
    assert not is_linearisable([made, step, taken, late, gone], [7])
    # Twice, dropped, or forgotten; an epoch too many; a session that nobody has made.
    twice = told("step", 5, 6, Result(DONE, total=FRESH + 4), holder=made, seq=1, x=2.0)
    assert not is_linearisable([made, step, twice], [7])
    dropped = told("step", 5, 6, Result(DONE, total=FRESH + 4), holder=made, seq=2, x=4.0)
    assert not is_linearisable([made, step, dropped], [7])
    assert not is_linearisable([made, step, told("resume", 7, 8, Result(DONE, epoch=8))], [7])
    assert not is_linearisable([made, step, told("resume", 7, 8, Result(DONE, epoch=9, applied=1))], [7])
    assert not is_linearisable([made], [])


def test_operations_that_overlap_are_put_in_any_order_and_others_in_theirs():
    made = told("create", 1, 2, Result(DONE, epoch=7))
    closed = told("close", 3, 6, Result(DONE))
    assert is_linearisable([made, closed, told("resume", 4, 5, Result(GONE))], [7])
    assert is_linearisable([made, closed, told("resume", 4, 5, Result(DONE, epoch=8))], [7])
    assert not is_linearisable([made, closed, told("resume", 7, 8, Result(DONE, epoch=8))], [7])


def test_an_operation_that_was_not_answered_may_have_been_done_or_not():
    made = told("create", 1, 2, Result(DONE, epoch=7))
    lost = Operation("step", 3, holder=made, seq=1, x=2.0)
    for applied in (0, 1):
        assert is_linearisable([made, lost, told("resume", 4, 5, Result(DONE, epoch=8, applied=applied))], [7])
    assert not is_linearisable([made, lost, told("resume", 4, 5, Result(DONE, epoch=8, applied=2))], [7])
