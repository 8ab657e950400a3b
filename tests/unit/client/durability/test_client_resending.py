"""What the store does not have of a session is kept, bounded, and sent again to whoever has the session next."""

import numpy as np
import pytest
from client_steps import crash, kinds, opened, reattach, stepped, steps_of, total, until_done
from conveyor._core.attachment import Opening
from conveyor._core.signature import Signature
from conveyor.errors import (
    ClientClosed,
    NotDurable,
    StepGap,
)
from conveyor_proto.v1 import session_pb2 as pb

# ------------------------------------------------------------ sending again


def test_what_the_store_lacked_is_sent_again_before_what_was_unanswered(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    cable.server.checkpoint(cable.server.sessions["s"])
    stepped(cable, step, session, 3)
    assert (session.applied_seq, session.durable_seq) == (6, 3)
    last = step(session)
    crash(cable)
    assert steps_of(reattach(cable)) == [(4, 3), (5, 3), (6, 3), (7, 3)]
    cable.cut()
    cable.settle()
    assert total(last) == 7
    assert session.applied_seq == 7


def test_what_is_sent_again_has_the_bytes_that_it_had(cable, step):
    session = opened(cable)
    step(session, 5, time_steps=3)
    (before,) = cable.core.take_outgoing()
    cable.up.append(before)
    cable.settle()
    crash(cable)
    (again,) = reattach(cable)
    assert again.SerializeToString() == before.SerializeToString()


def test_a_step_that_was_answered_is_sent_again_without_its_timeout(cable, specs):
    session = opened(cable)
    session.submit(Signature(specs["sum"]).prepare([1, 0]), 7)
    cable.settle()
    crash(cable)
    (again,) = reattach(cable)
    assert again.step.timeout_ms == 0


@pytest.mark.parametrize("credit", [1, 2, 3, 4, 7])
def test_what_is_sent_again_stays_within_the_credit(cable, step, credit):
    cable.server.credit = credit
    session = opened(cable)
    stepped(cable, step, session, 20)
    crash(cable)
    on_stream, most = 0, 0
    outgoing = reattach(cable)
    while outgoing:
        on_stream += len(steps_of(outgoing))
        most = max(most, on_stream)
        cable.up.extend(outgoing)
        while cable.up:
            cable.end.receive(cable.up.popleft())
        message = cable.down.popleft()
        on_stream -= len(message.frame.handles) // 4 if message.HasField("frame") else 1
        cable.core.receive(message)
        outgoing = cable.core.take_outgoing()
        while not outgoing and cable.down:
            message = cable.down.popleft()
            on_stream -= len(message.frame.handles) // 4 if message.HasField("frame") else 1
            cable.core.receive(message)
            outgoing = cable.core.take_outgoing()
    assert cable.server.sessions["s"].applied == 20
    assert most == credit


def test_new_steps_may_be_submitted_while_old_ones_are_sent_again(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 12)
    crash(cable)
    reattach(cable)
    tickets = [step(session) for _ in range(cable.server.credit)]
    assert session.blocker() is tickets[0]
    assert session.applied_seq == 12
    cable.cut()
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [13, 14, 15, 16]


def test_a_session_on_the_same_server_is_sent_nothing_again(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    cable.cut()
    assert reattach(cable) == []


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_without_a_store_and_with_one_that_is_ahead_nothing_is_kept(new_cable, new_replicas, step, durability):
    cable = new_cable(new_replicas(1, durability)[0])
    session = opened(cable)
    stepped(cable, step, session, 3)
    step(session)
    assert not session.unstored
    assert not session._unstored.buffer.half_full
    assert session._unstored.buffer._steps == 0
    assert session.durable_seq == (3 if durability == "sync" else 0)


@pytest.mark.parametrize("form", ["alone", "framed"])
def test_answers_say_what_is_stored_and_what_is_stored_is_not_kept(cable, step, form):
    cable.server.form = form
    session = opened(cable)
    stepped(cable, step, session, 2)
    cable.server.checkpoint(cable.server.sessions["s"])
    stepped(cable, step, session, 1)
    assert session.durable_seq == 2
    assert session._unstored.oldest == 3


def test_a_store_that_lost_what_it_had_acknowledged_is_told(cable, store, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    cable.server.checkpoint(cable.server.sessions["s"])
    stepped(cable, step, session, 2)
    store.records["s"].seq = 1
    crash(cable)
    cable.settle()
    with pytest.raises(StepGap, match="No more is kept here of steps 2 to 3") as error:
        session.blocker()
    assert error.value.metadata == {"session_id": "s", "seq": "6", "next_seq": "2"}


def test_a_session_that_others_stepped_meanwhile_is_theirs(cable, store, step):
    session = opened(cable)
    stepped(cable, step, session, 2)
    store.records["s"].seq = 9
    crash(cable)
    cable.settle()
    assert session.error is not None
    assert session.error.reason == "SESSION_TAKEN_OVER"


def test_what_follows_a_refused_step_is_not_kept(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 1)
    cable.server.failures["s", 2] = refused("MODEL_FAILED")
    tickets = [step(session) for _ in range(3)]
    cable.settle()
    assert all(ticket.failed for ticket in tickets)
    crash(cable)
    again = step(session, 10)
    cable.settle()
    assert total(again) == 11


# ------------------------------------------------------------ sent again and refused


@pytest.mark.parametrize("reason", ["MODEL_FAILED", "OVERLOADED", "STORE_UNAVAILABLE", "STEP_TIMEOUT", "DRAINING"])
def test_a_passing_refusal_of_what_was_answered_is_nobodys_failure(cable, step, refused, reason):
    session = opened(cable)
    stepped(cable, step, session, 4)
    waiting = step(session)
    crash(cable)
    cable.server.failures["s", 2] = refused(reason, retry_s=0.1)
    cable.settle()
    assert total(waiting) == 5
    assert session.error is None


def test_what_was_answered_and_cannot_be_applied_again_ends_the_session(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 4)
    waiting = step(session)
    crash(cable)
    cable.server.failures["s", 2] = refused("INPUT_TOO_LONG", input="x", max_time_steps="1")
    cable.settle()
    for use in (waiting.result, session.blocker):
        with pytest.raises(StepGap, match="step 2 of session 's' was answered by a server that is gone") as error:
            use()
        assert error.value.metadata["next_seq"] == "2"
    assert cable.server.sessions["s"].holder is None


def test_what_is_refused_again_and_again_ends_the_session_in_time(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 2)
    waiting = step(session)
    crash(cable)

    def refuse():
        cable.server.failures["s", 1] = refused("MODEL_FAILED")

    assert 28 < until_done(cable, waiting, refuse) <= 30
    with pytest.raises(StepGap, match="gave up after 30 s"):
        waiting.result()


def test_the_answer_that_the_new_server_forgot_is_not_missed_for_it_was_given(cable, step, refused):
    session = opened(cable)
    stepped(cable, step, session, 2)
    waiting = step(session)
    crash(cable)
    cable.server.failures["s", 1] = refused("STEP_ANSWER_EVICTED")
    cable.pump_up(), cable.pump_down()
    cable.up.extend(cable.core.take_outgoing())
    cable.server.sessions["s"].applied = 1
    cable.server.sessions["s"].state = np.float32([1, 0])
    cable.server.sessions["s"].answers.clear()
    cable.settle()
    assert total(waiting) == 3


# ------------------------------------------------------------ the buffer


def test_at_half_full_the_server_is_asked_to_store_once(cable, step):
    session = opened(cable, buffer_bytes=80)
    stepped(cable, step, session, 4)
    assert cable.server.flushes == []
    step(session)
    cable.pump_up(), cable.pump_down()
    (flush,) = cable.core.take_outgoing()
    assert flush.flush.handle == 1
    step(session)
    (another,) = cable.core.take_outgoing()
    assert another.HasField("step")
    cable.up.extend((flush, another))
    cable.settle()
    assert cable.server.flushes == ["s"]
    assert session.durable_seq == 5


def test_a_store_that_lags_is_asked_again(cable, step):
    session = opened(cable, buffer_bytes=80)
    stepped(cable, step, session, 4)
    step(session)
    cable.pump_up(), cable.pump_down()
    assert kinds(cable.core.take_outgoing()) == ["flush"]
    durable = pb.DurableSteps(handles=np.uint32(1).tobytes(), seqs=np.uint64(0).tobytes())
    cable.core.receive(pb.StreamResponse(durable=durable))
    assert kinds(cable.core.take_outgoing()) == ["flush"]


def test_a_full_buffer_holds_back_the_next_step_until_the_store_has_more(cable, store, step):
    session = opened(cable, buffer_bytes=24)
    store.away = True
    for _ in range(3):
        step(session)
        while cable.pump_up() or cable.pump_down():
            pass
    room = session.blocker()
    assert session.full
    assert room is not None
    assert session.busy
    cable.settle() if not store.away else None
    assert not room.done
    store.away = False
    cable.settle()
    assert room.done
    assert session.blocker() is None
    assert not session.full


def test_a_step_that_is_larger_than_the_buffer_goes_alone(cable, store, step):
    session = opened(cable, buffer_bytes=24)
    store.away = True
    large = step(session, time_steps=100)
    cable.pump_up(), cable.pump_down()
    assert total(large) == 100
    assert session.blocker() is not None
    store.away = False
    cable.settle()
    assert session.blocker() is None


def test_many_small_steps_fill_the_buffer_too(cable, store, step, monkeypatch):
    monkeypatch.setattr("conveyor._core.unstored.RESEND_BUFFER_STEPS", 6)
    session = opened(cable)
    store.away = True
    for _ in range(6):
        step(session)
        cable.pump_up(), cable.pump_down()
    assert session.full


def test_whoever_waits_for_room_hears_of_the_end(cable, store, step):
    session = opened(cable, buffer_bytes=8)
    store.away = True
    step(session)
    cable.pump_up(), cable.pump_down()
    room = session.blocker()
    session.end(ClientClosed("closed"))
    assert room.done
    with pytest.raises(ClientClosed):
        session.blocker()


# ------------------------------------------------------------ flush


def test_a_flush_is_done_when_what_was_answered_is_stored(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    flushed = session.flush()
    assert session.busy
    cable.settle()
    assert flushed.result() == 3
    assert not session.busy
    assert session.flush().done


def test_a_flush_that_was_cut_is_asked_for_again(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    flushed = session.flush()
    cable.pump_up()
    crash(cable)
    # The store has them, and says so at the attach.
    cable.settle()
    assert flushed.result() == 3
    stepped(cable, step, session, 2)
    flushed = session.flush()
    crash(cable)
    cable.settle()
    assert flushed.result() == 5
    assert cable.server.sessions["s"].applied == 5


def test_a_flush_waits_for_what_is_sent_again(cable, step):
    session = opened(cable)
    stepped(cable, step, session, 3)
    crash(cable)
    flushed = session.flush()
    assert kinds(reattach(cable)) == ["frame", "step"]
    cable.cut()
    cable.settle()
    assert flushed.result() == 3
    assert cable.server.flushes == ["s"]


def test_a_session_without_a_store_cannot_be_flushed(new_cable, new_replicas):
    session = opened(new_cable(new_replicas(1, "none")[0]))
    with pytest.raises(NotDurable, match="durability="):
        session.flush()


def test_a_flush_that_the_server_does_not_offer_fails_alone(cable, step, refused, monkeypatch):
    session = opened(cable)
    stepped(cable, step, session, 1)

    def refuse(self, flush):
        raise refused("NOT_DURABLE", durability="none", most="none")

    monkeypatch.setattr(type(cable.end), "_flush", refuse)
    flushed = session.flush()
    cable.settle()
    with pytest.raises(NotDurable):
        flushed.result()
    stepped(cable, step, session, 1)


def test_steps_of_another_client_that_are_not_stored_are_stored_at_once(cable, new_cable, step):
    first = opened(cable)
    stepped(cable, step, first, 3)
    other = new_cable(cable.server)
    second = other.session(opening=Opening.RESUME)
    other.settle()
    assert (second.applied_seq, second.durable_seq) == (3, 3)
    crash(other)
    other.settle()
    stepped(other, step, second, 1)
    assert second.applied_seq == 4
