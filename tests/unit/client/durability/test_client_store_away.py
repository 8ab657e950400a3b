"""A store that is away, and leaving a session that it does not have: everybody waits, and nobody for ever."""

import math

import grpc
import pytest
from client_steps import crash, opened, stepped, total, until_done
from conveyor._core.member import Leaving
from conveyor._core.signature import Signature
from conveyor._core.step import Step
from conveyor._core.ticket import Ticket
from conveyor._core.unstored import Unstored
from conveyor.errors import (
    ConnectionLost,
    RecordInvalid,
    SessionsExhausted,
    StepAborted,
    StoreUnavailable,
)
from conveyor_proto.v1 import session_pb2 as pb

# ------------------------------------------------------------ a store that is away


def test_an_opening_waits_for_the_store_and_disturbs_nobody(cable, store, step):
    old = opened(cable, session_id="old")
    store.away = True
    new = cable.session("new")
    cable.pump_up(), cable.pump_down()
    stream = cable.end
    waiting = step(old)
    cable.pump_up(), cable.pump_down()
    assert total(waiting) == 1
    store.away = False
    cable.settle()
    new.opened.result()
    assert cable.end is stream


def test_an_opening_does_not_wait_for_ever(cable, store):
    store.away = True
    session = cable.session()
    clock = 0.0
    while not session.opened.done:
        cable.pump_up(), cable.pump_down()
        cable.core.schedule(clock, 0.5)
        clock += cable.core.retry(clock) or 0.0
        cable.core.retry(clock)
    assert 3 < clock <= 5
    with pytest.raises(StoreUnavailable, match="gave up after 5 s"):
        session.opened.result()
    assert cable.core.member_count == 0


def test_a_session_that_finds_no_place_after_its_server_was_lost_waits_for_one(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 3)
    waiting = step(session)
    crash(cable)
    cable.server.refuse_attach += [refused("SESSIONS_EXHAUSTED", retry_s=1.0, max_sessions="1")] * 3
    cable.settle()
    assert total(waiting) == 4


def test_a_new_session_that_finds_no_place_is_told(cable, refused):
    cable.server.refuse_attach.append(refused("SESSIONS_EXHAUSTED", retry_s=1.0, max_sessions="1"))
    session = cable.session()
    cable.settle()
    with pytest.raises(SessionsExhausted):
        session.opened.result()


def test_an_opening_whose_store_did_it_and_did_not_say_so_is_repeated(cable, store, refused):
    cable.server.create("s", "sum")
    store.records["s"].epoch = 3
    cable.server.crash()
    cable.server.refuse_attach.append(refused("STORE_UNAVAILABLE", retry_s=0.1))
    session = opened(cable)
    assert session.info.epoch == 4


def test_a_step_waits_for_the_store(new_cable, new_replicas, step):
    replica = new_replicas(1, "sync")[0]
    cable = new_cable(replica)
    session = opened(cable)
    stepped(cable, step, session, 1)
    replica.store.away = True
    tickets = [step(session) for _ in range(3)]
    for _ in range(5):
        while cable.pump_up() or cable.pump_down():
            pass
        assert cable.pump_time()
    assert not any(ticket.done for ticket in tickets)
    replica.store.away = False
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [2, 3, 4]


def test_a_store_that_stays_away_is_told_as_such(new_cable, new_replicas, step):
    replica = new_replicas(1, "sync")[0]
    cable = new_cable(replica)
    session = opened(cable)
    replica.store.away = True
    waiting = step(session)
    assert 28 < until_done(cable, waiting) <= 30
    with pytest.raises(StoreUnavailable, match="gave up after 30 s"):
        waiting.result()


def test_a_session_that_nobody_waits_for_is_not_ended_by_a_store_that_stays_away(cable, store, step):
    session = opened(cable)
    stepped(cable, step, session, 1)
    store.away = True
    cable.cut()
    clock, tries = 0.0, 0
    while clock < 100:
        cable.pump_up(), cable.pump_down()
        cable.core.schedule(clock, 0.5)
        clock += cable.core.retry(clock) or math.inf
        cable.core.retry(clock)
        tries += 1
    assert tries <= 101
    waiting = step(session)
    store.away = False
    cable.settle()
    assert total(waiting) == 2


def test_a_flush_that_the_store_does_not_answer_fails_and_the_session_goes_on(cable, store, step):
    session = opened(cable)
    stepped(cable, step, session, 1)
    store.away = True
    flushed = session.flush()
    clock = 0.0
    while not flushed.done:
        cable.pump_up(), cable.pump_down()
        cable.core.schedule(clock, 0.5)
        clock += cable.core.retry(clock) or 0.0
        cable.core.retry(clock)
    with pytest.raises(StoreUnavailable):
        flushed.result()
    waiting = step(session)
    cable.pump_up(), cable.pump_down()
    assert total(waiting) == 2
    store.away = False
    again = session.flush()
    cable.settle()
    assert again.result() == 2


def test_a_flush_that_was_refused_sends_no_step_again_that_is_not_refused_yet(cable, step):
    cable.server.patient = False
    session = opened(cable)
    stepped(cable, step, session, 1)
    session.flush()
    tickets = []
    for value in (2, 3):
        tickets.append(step(session, value))
        cable.up.extend(cable.core.take_outgoing())
    cable.server.store.away = True
    # The flush and the first step are refused, the second step is still on its way.
    for _ in range(2):
        cable.end.receive(cable.up.popleft())
        cable.pump_down()
    cable.pump_time()
    assert cable.core.take_outgoing() == []
    cable.end.receive(cable.up.popleft())
    cable.server.store.away = False
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [3, 6]


def test_a_step_that_was_put_off_behind_one_that_failed_is_aborted(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 1)
    cable.core.take_outgoing()
    first, second = step(session), step(session)
    cable.core.take_outgoing()
    later, failed = refused("STORE_UNAVAILABLE", retry_s=0.1).status, refused("MODEL_FAILED", seq="2").status
    for seq, status in ((3, later), (2, failed)):
        cable.core.receive(pb.StreamResponse(error=pb.StepError(handle=1, seq=seq, status=status)))
    assert first.failed
    cable.pump_time()
    with pytest.raises(StepAborted):
        second.result()
    assert session.blocker() is None
    cable.end.receive(cable.core.take_outgoing()[0]) if cable.core.has_outgoing else None
    again = step(session, 10)
    cable.settle()
    assert total(again) == 11


def test_an_answer_may_come_before_that_of_a_step_that_was_put_off(new_cable, new_replicas, step):
    replica = new_replicas(1, "sync")[0]
    cable = new_cable(replica)
    session = opened(cable)
    first = step(session)
    cable.up.extend(cable.core.take_outgoing())
    second = step(session)
    cable.up.extend(cable.core.take_outgoing())
    replica.store.away = True
    cable.pump_up()
    replica.store.away = False
    cable.pump_up()
    cable.pump_down(), cable.pump_down()
    assert (first.done, total(second)) == (False, 2)
    assert session.applied_seq == 0
    cable.cut()
    cable.settle()
    assert total(first) == 1
    assert session.applied_seq == 2


def test_steps_are_kept_in_their_order_whichever_was_answered_first(specs):
    unstored = Unstored(1 << 20)
    unstored.granted(pb.SessionInfo(durability=pb.DURABILITY_ASYNC), [])
    prepared = Signature(specs["sum"]).prepare([1, 0])
    for seq in (2, 1, 3):
        unstored.answered(Step(seq, prepared, 0, Ticket()))
    assert unstored.oldest == 1
    assert [each.seq for each in unstored.after(0)] == [1, 2, 3]


def test_what_is_refused_twice_before_its_time_is_asked_for_once(cable):
    session = opened(cable)
    error = StoreUnavailable("away", retry_s=0.5)
    cable.core.postpone(1, error)
    cable.core.schedule(0.0, 0.5)
    assert cable.core.retry(0.0) == 1.0, "nobody waits, so there is no haste"
    cable.core.postpone(1, error)
    assert not cable.core.has_postponed
    assert cable.core.retry(0.75) == 0.25
    assert cable.core.retry(1.0) is None
    assert session.error is None


def test_a_torn_record_ends_the_session(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 1)
    waiting = step(session)
    cable.cut()
    cable.server.refuse_attach.append(refused("RECORD_INVALID", session_id="s"))
    cable.settle()
    with pytest.raises(RecordInvalid):
        waiting.result()


# ------------------------------------------------------------ farewells and leaving


def test_a_resume_token_goes_with_the_attaches_until_one_is_granted(cable, replicas, store, step):
    one, two = opened(cable, session_id="one"), opened(cable, session_id="two")
    stepped(cable, step, one, 1)
    cable.farewell("moved")
    while cable.down:
        cable.pump_down()
    cable.move(replicas[1])
    cable.core.take_outgoing()
    cable.cut()
    cable.settle()
    assert replicas[1].resume_tokens == ["moved", "moved"]
    cable.cut()
    cable.settle()
    assert replicas[1].resume_tokens == ["moved", "moved"]
    assert (one.applied_seq, two.applied_seq) == (1, 0)
    assert replicas[1].sessions["one"].applied == 1


def test_a_detach_that_was_cut_is_repeated_where_the_store_lacks_steps(cable, step, store):
    session = opened(cable)
    stepped(cable, step, session, 3)
    left = session.leave(Leaving.DETACH)
    crash(cable)
    assert not left.done
    assert session.busy
    cable.settle()
    left.result()
    assert store.records["s"].seq == 3
    assert session.durable_seq == 3


def test_a_detach_that_was_cut_is_done_where_the_store_lacks_nothing(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    session.flush()
    cable.settle()
    left = session.leave(Leaving.DETACH)
    crash(cable)
    left.result()


@pytest.mark.parametrize("how", [Leaving.DETACH, Leaving.CLOSE])
def test_whoever_leaves_waits_for_the_store(cable, step, store, how):
    session = opened(cable)
    stepped(cable, step, session, 3)
    store.away = True
    left = session.leave(how)
    cable.pump_up(), cable.pump_down()
    cable.pump_time()
    assert not left.done
    store.away = False
    cable.settle()
    left.result()
    kept = {name: record.seq for name, record in store.records.items()}
    assert kept == ({"s": 3} if how is Leaving.DETACH else {})


def test_a_client_that_closes_leaves_those_of_which_the_store_lacks_steps(cable, step, store):
    behind, level = opened(cable, session_id="behind"), opened(cable, session_id="level")
    for session in (behind, level):
        stepped(cable, step, session, 2)
    level.flush()
    cable.settle()
    (left,) = cable.core.leave_unstored()
    cable.settle()
    left.result()
    assert store.records["behind"].seq == 2
    assert level.error is None


def test_a_link_that_was_given_up_is_tried_again_for_whoever_waits_for_room(cable, store, step):
    session = opened(cable, buffer_bytes=8)
    store.away = True
    step(session)
    cable.pump_up(), cable.pump_down()
    cable.end.broken()
    gone = ConnectionLost("gone", code=grpc.StatusCode.UNAVAILABLE)
    clock = 0.0
    while (delay_s := cable.core.lost(gone, clock, 1.0)) is not None:
        clock += delay_s
    assert session.error is None
    assert not cable.core.wanted
    session.blocker()
    assert cable.core.wanted
