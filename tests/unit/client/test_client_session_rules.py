"""The rules of one session on a stream, one by one, without I/O."""

import grpc
import numpy as np
import pytest
from conveyor._core.attachment import Opening
from conveyor._core.member import Leaving
from conveyor._core.signature import Signature
from conveyor.errors import (
    ClientClosed,
    ConnectionLost,
    ConveyorError,
    Draining,
    InvalidInput,
    ModelFailed,
    ModelNotFound,
    ProtocolError,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SessionTakenOver,
    StepAborted,
    StepAnswerEvicted,
    StepConflict,
    StepGap,
)
from conveyor_proto.v1 import session_pb2 as pb


@pytest.fixture
def cable(new_cable):
    return new_cable()


@pytest.fixture
def step(specs):
    """Submits [value, 0] on a session."""
    signature = Signature(specs["sum"])

    def submit(session, value=1.0):
        assert session.blocker() is None
        return session.submit(signature.prepare([value, 0])).ticket

    return submit


def total(ticket):
    return np.frombuffer(ticket.result().outputs[0], np.float32)[0]


def opened(cable, **claim):
    session = cable.session(**claim)
    cable.settle()
    session.opened.result()
    return session


def test_steps_are_numbered_from_one_and_acknowledge_what_was_answered(cable, step):
    session = opened(cable)
    step(session)
    cable.settle()
    step(session)
    (second,) = cable.core.take_outgoing()
    step(session)
    (third,) = cable.core.take_outgoing()
    assert [(s.step.seq, s.step.acked_seq) for s in (second, third)] == [(2, 1), (3, 1)]


def test_credit_bounds_what_is_unanswered(cable, step):
    session = opened(cable)
    tickets = [step(session) for _ in range(4)]
    assert session.blocker() is tickets[0]
    cable.settle()
    assert session.blocker() is None
    assert total(tickets[-1]) == 4


def test_a_refused_step_gives_its_number_to_the_next_once_all_after_it_were_aborted(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 2] = refused("MODEL_FAILED")
    tickets = [step(session) for _ in range(3)]
    for _ in range(3):
        cable.pump_up()
    cable.pump_down(), cable.pump_down()
    with pytest.raises(ModelFailed):
        tickets[1].result()
    # The answer to the third is still on its way: a new step now could be mistaken for it.
    assert session.blocker() is tickets[2]
    cable.settle()
    with pytest.raises(StepAborted) as aborted:
        tickets[2].result()
    assert aborted.value.metadata["next_seq"] == "2"
    assert session.applied_seq == 1
    again = step(session, 10)
    cable.settle()
    assert total(again) == 11
    assert session.applied_seq == 2


def test_a_cut_after_a_refusal_aborts_what_followed_and_sends_it_no_more(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 1] = refused("INPUT_NON_FINITE", input="x")
    first, second = step(session), step(session)
    cable.pump_up(), cable.pump_down()
    cable.cut()
    for ticket, kind in ((first, InvalidInput), (second, StepAborted)):
        with pytest.raises(kind):
            ticket.result()
    cable.settle()
    assert cable.server.sessions["s"].applied == 0


def test_unanswered_steps_are_sent_again_with_the_same_content(cable, step):
    session = opened(cable)
    first, second = step(session, 1), step(session, 2)
    (before,) = cable.core.take_outgoing()
    cable.end.receive(before)
    cable.cut()
    assert not first.done
    cable.pump_up(), cable.pump_down()
    (again,) = cable.core.take_outgoing()
    assert again.SerializeToString() == before.SerializeToString()
    cable.up.append(again)
    cable.settle()
    assert (total(first), total(second)) == (1, 3)
    assert first.result().replayed
    assert second.result().replayed


def test_an_attach_whose_answer_was_lost_is_repeated_without_losing_the_session_to_oneself(cable, step):
    session = cable.session()
    for _ in range(3):
        cable.pump_up()
        cable.cut()
    cable.settle()
    step(session)
    for _ in range(3):
        cable.cut()
        cable.pump_up()
    cable.settle()
    assert cable.server.sessions["s"].epoch == 7
    assert session.applied_seq == 1


def test_an_id_that_is_taken_is_told_also_after_a_lost_answer(cable, new_cable, step):
    first = opened(cable)
    step(first)
    cable.settle()
    second = cable.session()
    cable.settle()
    with pytest.raises(SessionExists):
        second.opened.result()

    other = new_cable()
    other.server = cable.server
    other.connect()
    third = other.session()
    other.cut()
    other.settle()
    with pytest.raises(SessionExists):
        third.opened.result()


def test_a_client_that_was_cut_off_never_takes_a_session_back(cable, new_cable, step):
    session = opened(cable)
    waiting = step(session)
    cable.cut()
    other = new_cable()
    other.server = cable.server
    other.connect()
    theirs = other.session(opening=Opening.RESUME)
    other.settle()
    cable.settle()
    with pytest.raises(SessionTakenOver):
        waiting.result()
    with pytest.raises(SessionTakenOver):
        session.blocker()
    step(theirs)
    other.settle()
    assert theirs.applied_seq == 1


def test_a_server_that_ignores_max_epoch_is_noticed(cable, new_cable):
    session = opened(cable)
    cable.server.sessions["s"].epoch += 3
    attach = session.attachment.request().attach
    assert attach.max_epoch == 1
    info = pb.SessionInfo(session_id="s", epoch=5)
    session.attached(pb.SessionAttached(handle=attach.handle, session=info, resumed=True))
    assert isinstance(session.error, SessionTakenOver)


def test_a_session_that_is_taken_over_says_so_to_whoever_waits(cable, new_cable, step):
    session = opened(cable)
    waiting = step(session)
    cable.core.take_outgoing()
    other = new_cable()
    other.server = cable.server
    other.connect()
    other.session(opening=Opening.RESUME)
    other.settle()
    cable.settle()
    with pytest.raises(SessionTakenOver, match="another client"):
        waiting.result()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("SESSION_NOT_FOUND", SessionNotFound), ("SESSION_EXPIRED", SessionExpired), ("SESSION_CLOSED", SessionClosed)],
)
def test_a_session_that_the_server_lost_is_never_begun_again(cable, step, reason, kind, refused):
    session = opened(cable)
    waiting = step(session)
    cable.cut()
    cable.server.refuse_attach.append(refused(reason, session_id="s"))
    cable.settle()
    with pytest.raises(kind):
        waiting.result()
    with pytest.raises(kind):
        session.blocker()
    cable.cut()
    cable.up.extend(cable.core.take_outgoing())
    assert not cable.up


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (pb.DETACH_CAUSE_EXPIRED, SessionExpired, "idle"),
        (pb.DETACH_CAUSE_CLOSED, SessionClosed, "closed"),
        (pb.DETACH_CAUSE_MODEL_UNLOADED, SessionClosed, "model unloaded"),
        (pb.DETACH_CAUSE_TAKEN_OVER, SessionTakenOver, "another client"),
        (pb.DETACH_CAUSE_DETACHED, ConnectionLost, "let go"),
    ],
)
def test_what_the_server_says_when_it_takes_a_session_from_the_stream(cable, cause, kind, words):
    session = opened(cable)
    session.detached(pb.SessionDetached(handle=1, cause=cause, session_id="s"))
    with pytest.raises(kind, match=words):
        session.blocker()


def test_a_server_that_went_back_is_not_gone_on_with(cable, step):
    session = opened(cable)
    for _ in range(3):
        step(session)
        cable.settle()
    cable.server.sessions["s"].applied = 1
    cable.cut()
    cable.settle()
    with pytest.raises(StepGap, match="lost some"):
        session.blocker()


def test_a_session_that_others_stepped_meanwhile_is_not_gone_on_with(cable, step):
    session = opened(cable)
    step(session)
    cable.settle()
    cable.server.sessions["s"].applied = 7
    cable.cut()
    cable.settle()
    with pytest.raises(SessionTakenOver):
        session.blocker()


def test_an_evicted_answer_is_told_and_the_numbering_goes_on(cable, step):
    session = opened(cable)
    lost = step(session)
    cable.pump_up()
    cable.server.sessions["s"].answers.clear()
    cable.cut()
    cable.settle()
    with pytest.raises(StepAnswerEvicted):
        lost.result()
    after = step(session)
    cable.settle()
    assert total(after) == 2


def test_a_conflict_ends_the_object_for_two_clients_number_one_session(cable, step):
    session = opened(cable)
    mine = step(session, 1)
    cable.pump_up()
    cable.server.sessions["s"].contents[1] = [b"theirs"]
    cable.cut()
    cable.settle()
    for use in (mine.result, session.blocker):
        with pytest.raises(StepConflict):
            use()


def test_a_draining_refusal_is_kept_for_the_next_stream(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 2] = refused("DRAINING", retry_s=3.0)
    tickets = [step(session) for _ in range(4)]
    for _ in range(4):
        cable.pump_up()
    for _ in range(4):
        cable.pump_down()
    assert [ticket.done for ticket in tickets] == [True, False, False, False]
    assert cable.core.finishing
    cable.end.broken()
    delay_s = cable.core.lost(ConnectionLost("ended", code=grpc.StatusCode.OK), 0.0, 0.5)
    assert delay_s == 3.0
    cable.connect()
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [1, 2, 3, 4]


def test_draining_for_too_long_is_told_as_such(cable, refused):
    session = cable.session()
    clock = 0.0
    while not session.opened.done:
        cable.server.refuse_attach.append(refused("DRAINING", retry_s=1.0))
        cable.pump_up(), cable.pump_down()
        clock += cable.core.lost(ConnectionLost("ended", code=grpc.StatusCode.OK), clock, 0.5) or 0.0
        cable.connect()
    with pytest.raises(Draining, match="gave up"):
        session.opened.result()
    assert 3 < clock <= 5


def test_a_model_that_is_not_there_is_told_at_once(cable):
    session = cable.session(model="nope")
    cable.settle()
    with pytest.raises(ModelNotFound) as error:
        session.opened.result()
    assert error.value.metadata == {"model": "nope", "available": "sum, mix"}
    assert cable.core.member_count == 0


def test_a_model_that_is_not_ready_stops_an_opening_and_not_a_resume(cable, step, refused):
    cable.server.refuse_attach.append(refused("MODEL_NOT_READY", retry_s=0.1, model="sum"))
    session = cable.session("new")
    cable.settle()
    assert session.error is not None
    session = opened(cable)
    cable.cut()
    cable.server.refuse_attach.append(refused("MODEL_NOT_READY", retry_s=0.1, model="sum"))
    cable.settle()
    waiting = step(session)
    cable.settle()
    assert total(waiting) == 1


def test_closing_waits_for_the_answers(cable, step):
    session = opened(cable)
    waiting = step(session)
    left = session.leave(Leaving.CLOSE)
    cable.settle()
    assert total(waiting) == 1
    left.result()
    assert cable.server.gone.keys() == {"s"}
    with pytest.raises(ClientClosed, match="closed by this client"):
        session.blocker()


def test_closing_survives_cuts_and_finds_the_session_closed(cable):
    session = opened(cable)
    left = session.leave(Leaving.CLOSE)
    cable.cut()
    cable.pump_up(), cable.pump_down()
    cable.pump_up()
    cable.cut()
    cable.settle()
    left.result()
    assert cable.server.sessions == {}


def test_detaching_leaves_the_session_on_the_server(cable, step):
    session = opened(cable)
    step(session)
    left = session.leave(Leaving.DETACH)
    cable.settle()
    left.result()
    assert cable.server.sessions["s"].holder is None
    again = opened(cable, opening=Opening.RESUME)
    assert again.applied_seq == 1


def test_a_cut_is_a_detach(cable):
    session = opened(cable)
    left = session.leave(Leaving.DETACH)
    cable.cut()
    left.result()


def test_an_opening_that_is_given_up_leaves_nothing_behind(cable):
    session = cable.session()
    session.end(ClientClosed("given up"))
    cable.core.forget_if_gone(session)
    cable.settle()
    assert cable.server.sessions == {}
    assert cable.core.member_count == 0


def test_when_nobody_comes_back_in_time_those_who_wait_are_told_and_the_idle_can_go_on(cable, step):
    busy, idle = opened(cable, session_id="busy"), opened(cable, session_id="idle")
    waiting = step(busy)
    cable.end.broken()
    gone = ConnectionLost("gone", code=grpc.StatusCode.UNAVAILABLE)
    clock = 0.0
    while (delay_s := cable.core.lost(gone, clock, 1.0)) is not None:
        clock += delay_s
    assert 20 < clock <= 30
    with pytest.raises(ConnectionLost, match="gave up after 30 s"):
        waiting.result()
    assert not cable.core.wanted
    late = step(idle)
    assert cable.core.wanted
    cable.connect()
    cable.settle()
    assert total(late) == 1


def test_a_stream_that_may_not_be_opened_is_not_tried_again(cable, step):
    session = opened(cable)
    waiting = step(session)
    error = ConveyorError("no rights", code=grpc.StatusCode.PERMISSION_DENIED)
    assert cable.core.lost(error, 0.0, 0.5) is None
    with pytest.raises(ConveyorError, match="no rights"):
        waiting.result()


@pytest.mark.parametrize(
    "message",
    [
        pb.StreamResponse(),
        pb.StreamResponse(error=pb.StepError(handle=0)),
        pb.StreamResponse(frame=pb.ResultFrame(handles=b"123")),
    ],
)
def test_a_server_that_makes_no_sense_is_a_protocol_error(cable, message):
    with pytest.raises(ProtocolError):
        cable.core.receive(message)


def test_messages_about_handles_that_are_gone_are_ignored(cable, refused):
    for message in (
        pb.StreamResponse(attached=pb.SessionAttached(handle=9)),
        pb.StreamResponse(result=pb.StepResult(handle=9, seq=1)),
        pb.StreamResponse(error=pb.StepError(handle=9, seq=1, status=refused("MODEL_FAILED").status)),
        pb.StreamResponse(detached=pb.SessionDetached(handle=9)),
    ):
        cable.core.receive(message)
    assert cable.core.member_count == 0


def test_a_closed_stream_takes_nothing_more(cable, step):
    session = opened(cable)
    waiting = step(session)
    cable.core.close(ClientClosed("closed"))
    for use in (waiting.result, session.blocker, lambda: cable.core.reserve(1)):
        with pytest.raises(ClientClosed):
            use()
    assert not cable.core.wanted
