"""Every rule of a session's numbering, one test each."""

import gc
import math

import pytest
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2
from conveyor_server.engine.run_times import RunTimes
from conveyor_server.errors import Refused
from conveyor_server.sessions.events import Answer, Closed, Detached
from conveyor_server.sessions.session import Session, Submission


def reason_of(answer):
    assert answer.fault is not None, "the step was expected to be refused"
    return answer.fault.reason_name


def test_next_seq_is_applied_and_state_is_kept(core):
    session = core.create()
    assert core.step(session, 1.0) == [11.0]
    assert core.step(session, 2.0, 3.0) == [13.0, 16.0]
    assert session.applied_seq == 2
    assert session.applied_time_steps == 3
    core.check_slots()


def test_sent_again_is_answered_from_the_record_and_not_applied(core):
    session = core.create()
    first = core.step(session, 5.0)
    tag = core.send(session, 1, 5.0)
    answer = core.answers()[tag]
    assert answer.replayed
    assert answer.outputs[0][:, 0].tolist() == first
    assert len(core.runner.runs) == 1
    assert core.step(session, 1.0) == [16.0]


def test_sent_again_with_other_content_is_a_conflict(core):
    session = core.create()
    core.step(session, 5.0)
    tag = core.send(session, 1, 6.0)
    assert reason_of(core.answers()[tag]) == "STEP_CONFLICT"
    assert core.step(session, 1.0) == [16.0]


def test_sent_again_while_pending_shares_the_answer(core):
    session = core.create()
    first, again = core.send(session, 1, 5.0), core.send(session, 1, 5.0)
    other = core.send(session, 1, 7.0)
    answers = core.answers()
    assert [answers[first].replayed, answers[again].replayed] == [False, True]
    assert answers[again].outputs[0].tolist() == [[15.0]]
    assert reason_of(answers[other]) == "STEP_CONFLICT"
    assert session.applied_seq == 1


def test_gap_names_the_next_seq(core):
    session = core.create()
    core.step(session, 1.0)
    tag = core.send(session, 4, 1.0)
    answer = core.answers()[tag]
    assert reason_of(answer) == "STEP_GAP"
    assert answer.fault.metadata["next_seq"] == "2"
    assert core.step(session, 1.0) == [12.0]


def test_seq_zero_is_refused(core):
    session = core.create()
    tag = core.send(session, 0, 1.0)
    assert reason_of(core.answers()[tag]) == "MESSAGE_INVALID"


def test_answer_past_the_ring_is_evicted_and_says_so(core):
    session = core.create(max_in_flight=2)
    for _ in range(3):
        core.step(session, 1.0)
    tag = core.send(session, 1, 1.0)
    answer = core.answers()[tag]
    assert reason_of(answer) == "STEP_ANSWER_EVICTED"
    assert answer.fault.metadata["oldest_seq"] == "2"


def test_acknowledged_answers_are_forgotten(core):
    session = core.create()
    core.step(session, 1.0)
    core.step(session, 1.0)
    core.send(session, 3, 1.0, acked_seq=2)
    core.settle()
    assert session.answers.oldest_seq == 3
    tag = core.send(session, 2, 1.0)
    assert reason_of(core.answers()[tag]) == "STEP_ANSWER_EVICTED"


def test_a_fenced_holder_acknowledges_nothing(core):
    session = core.create()
    core.step(session, 1.0)
    core.directory.attach(session, "old", 1, core.now)
    core.directory.attach(session, "new", 1, core.now)
    core.send(session, 2, 1.0, epoch=1, acked_seq=1)
    core.settle()
    assert session.answers.oldest_seq == 1


def test_acknowledging_the_future_loses_nothing(core):
    session = core.create()
    core.send(session, 1, 1.0, acked_seq=99)
    core.settle()
    tag = core.send(session, 1, 1.0)
    assert core.answers()[tag].replayed


def test_after_a_failed_step_later_ones_are_aborted_until_it_is_sent_again(core):
    session = core.create()
    bad = core.send(session, 1, core.runner.OVERFLOW)
    later = [core.send(session, seq, 1.0) for seq in (2, 3)]
    answers = core.answers()
    assert reason_of(answers[bad]) == "STATE_NON_FINITE"
    for tag in later:
        assert reason_of(answers[tag]) == "STEP_ABORTED"
        assert answers[tag].fault.metadata["next_seq"] == "1"
    late = core.send(session, 4, 1.0)
    assert reason_of(core.answers()[late]) == "STEP_ABORTED"
    good = core.send(session, 1, 2.0)
    following = core.send(session, 2, 1.0)
    answers = core.answers()
    assert answers[good].outputs[0].tolist() == [[12.0]]
    assert answers[following].outputs[0].tolist() == [[13.0]]
    core.check_slots()


def test_refused_content_aborts_what_follows_and_not_what_went_before(core):
    session = core.create()
    first = core.send(session, 1, 1.0)
    bad = 100
    fault = Fault(e.ERROR_REASON_INPUT_SHAPE, "no", {"input": "x"})
    core.directory.submit(session, Submission(2, bad, fault=fault), core.now)
    later = core.send(session, 3, 1.0)
    answers = core.answers()
    assert answers[first].outputs[0].tolist() == [[11.0]]
    assert reason_of(answers[bad]) == "INPUT_SHAPE"
    assert answers[bad].fault.metadata["seq"] == "2"
    assert reason_of(answers[later]) == "STEP_ABORTED"
    assert core.step(session, 4.0) == [15.0]


def test_failure_before_a_refused_seq_moves_the_resend_point_back(core):
    session = core.create()
    first = core.send(session, 1, core.runner.OVERFLOW)
    fault = Fault(e.ERROR_REASON_INPUT_SHAPE, "no")
    core.directory.submit(session, Submission(2, 101, fault=fault), core.now)
    assert reason_of(core.answers()[first]) == "STATE_NON_FINITE"
    tag = core.send(session, 2, 1.0)
    answer = core.answers()[tag]
    assert reason_of(answer) == "STEP_ABORTED"
    assert answer.fault.metadata["next_seq"] == "1"


def test_credit_bounds_unanswered_steps(core):
    session = core.create(max_in_flight=2)
    tags = [core.send(session, seq, 1.0) for seq in (1, 2, 3)]
    answers = core.answers()
    assert answers[tags[1]].fault is None
    assert reason_of(answers[tags[2]]) == "CREDIT_EXCEEDED"
    assert core.step(session, 1.0) == [13.0]


def test_overload_is_refused_with_a_retry_delay(make_core):
    core = make_core(max_queue_s=1.0)
    session, other = core.create(), core.create()
    core.engine.run_times = RunTimes({(1, 1): 1.0})
    core.send(session, 1, 1.0, 1.0)
    tag = core.send(other, 1, 1.0)
    answer = core.directory.take_events()[0]
    assert (answer.reply_to, reason_of(answer)) == (tag, "OVERLOADED")
    assert answer.fault.retry_s > 0


def test_step_that_waited_too_long_fails_and_moves_nothing(core):
    session = core.create()
    late = core.send(session, 1, 1.0, timeout_s=0.5)
    behind = core.send(session, 2, 1.0)
    assert core.directory.next_expiry_at() == 0.5
    core.now = 0.6
    core.directory.expire(core.now)
    answers = {event.reply_to: event for event in core.directory.take_events()}
    assert reason_of(answers[late]) == "STEP_TIMEOUT"
    assert reason_of(answers[behind]) == "STEP_ABORTED"
    assert core.step(session, 1.0) == [11.0]
    core.check_slots()


def test_running_step_does_not_time_out(core):
    session = core.create()
    running = core.send(session, 1, 1.0, timeout_s=0.5)
    queued = core.send(session, 2, 1.0, timeout_s=0.5)
    batch = core.engine.next_batch(core.now)
    core.now = 1.0
    core.directory.expire(core.now)
    (event,) = core.directory.take_events()
    assert event.reply_to == queued
    assert reason_of(event) == "STEP_TIMEOUT"
    core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    (event,) = core.directory.take_events()
    assert event.reply_to == running
    assert event.fault is None


def test_cancelled_step_moves_nothing(core):
    session = core.create()
    tag = core.send(session, 1, 1.0)
    core.directory.cancel(session, 1, tag)
    assert core.answers() == {}
    assert session.applied_seq == 0
    assert core.step(session, 2.0) == [12.0]
    core.check_slots()


def test_cancel_leaves_a_step_that_someone_else_waits_for(core):
    session = core.create()
    first, second = core.send(session, 1, 1.0), core.send(session, 1, 1.0)
    core.directory.cancel(session, 1, first)
    answers = core.answers()
    assert list(answers) == [second]
    assert answers[second].outputs[0].tolist() == [[11.0]]


def test_old_epoch_is_fenced(core):
    session = core.create()
    core.directory.attach(session, "a", 1, core.now)
    core.directory.attach(session, "b", 1, core.now)
    core.directory.take_events()
    tag = core.send(session, 1, 1.0, epoch=1)
    assert reason_of(core.answers()[tag]) == "SESSION_TAKEN_OVER"
    tag = core.send(session, 1, 1.0, epoch=2)
    assert core.answers()[tag].fault is None


def test_a_client_that_was_cut_off_does_not_take_back_what_another_resumed(core):
    session = core.create()
    core.directory.attach(session, "mine", 1, core.now)
    core.directory.attach(session, "theirs", 1, core.now, max_epoch=1)
    with pytest.raises(Refused) as refusal:
        core.directory.attach(session, "mine again", 1, core.now, max_epoch=1)
    assert refusal.value.fault.reason_name == "SESSION_TAKEN_OVER"
    assert session.attachment.owner == "theirs"


def test_resume_aborts_waiting_steps_of_the_older_stream_and_lets_the_running_one_finish(core):
    session = core.create()
    older = core.directory.attach(session, "old", 7, core.now)
    running, waiting = core.send(session, 1, 1.0), core.send(session, 2, 1.0)
    batch = core.engine.next_batch(core.now)
    newer = core.directory.attach(session, "new", 3, core.now)
    aborted, detached = core.directory.take_events()
    assert aborted.reply_to == waiting
    assert reason_of(aborted) == "SESSION_TAKEN_OVER"
    assert detached == Detached(older, session_pb2.DETACH_CAUSE_TAKEN_OVER, 0)
    assert not older.live
    assert newer.epoch == 2
    again = core.send(session, 1, 1.0)
    core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    answers = core.answers()
    assert set(answers) == {running, again}
    assert session.applied_seq == 1
    assert core.step(session, 1.0) == [12.0]


def test_broken_stream_leaves_the_session_and_its_answers(core):
    session = core.create()
    attachment = core.directory.attach(session, "s", 1, core.now)
    core.send(session, 1, 1.0)
    core.directory.abandon([attachment], core.now)
    core.settle()
    assert session.applied_seq == 1
    core.directory.attach(session, "t", 1, core.now)
    tag = core.send(session, 1, 1.0)
    assert core.answers()[tag].replayed


def test_detach_waits_for_the_last_answer(core):
    session = core.create()
    attachment = core.directory.attach(session, "s", 1, core.now)
    core.send(session, 1, 1.0)
    core.directory.detach(attachment, core.now)
    assert core.directory.take_events() == []
    answer, detached = core.settle()
    assert isinstance(answer, Answer)
    assert detached == Detached(attachment, session_pb2.DETACH_CAUSE_DETACHED, 1)
    assert core.directory.lookup(session.id) is session


def test_close_waits_for_the_last_answer_and_is_remembered(core):
    session = core.create("me")
    attachment = core.directory.attach(session, "s", 1, core.now)
    core.send(session, 1, 1.0)
    core.directory.close(session, "closer", core.now)
    refused = core.send(session, 2, 1.0)
    answers = core.settle()
    assert reason_of(answers[0]) == "SESSION_CLOSED"
    assert answers[0].reply_to == refused
    assert answers[2:] == [Detached(attachment, session_pb2.DETACH_CAUSE_CLOSED, 1), Closed("closer", 1)]
    with pytest.raises(Refused, match=r"closed \(closed\) after step 1") as refusal:
        core.directory.lookup("me")
    assert refusal.value.fault.reason_name == "SESSION_CLOSED"
    core.check_slots()


def test_unknown_session_is_not_found(core):
    with pytest.raises(Refused, match="never here, or the server was restarted") as refusal:
        core.directory.lookup("ghost")
    assert refusal.value.fault.reason_name == "SESSION_NOT_FOUND"


def test_idle_session_expires_and_says_so(core):
    session = core.create("idle", idle_timeout_s=5.0)
    attachment = core.directory.attach(session, "s", 1, core.now)
    core.now = 4.0
    core.step(session, 1.0)
    core.now = 8.9
    assert core.directory.expire(core.now) == 0
    core.now = 9.1
    assert core.directory.expire(core.now) == 1
    assert core.directory.take_events() == [Detached(attachment, session_pb2.DETACH_CAUSE_EXPIRED, 1)]
    with pytest.raises(Refused, match="idle for 5 s") as refusal:
        core.directory.lookup("idle")
    assert refusal.value.fault.reason_name == "SESSION_EXPIRED"
    core.check_slots()


def test_session_with_a_step_under_way_is_not_idle(core):
    session = core.create(idle_timeout_s=1.0)
    tag = core.send(session, 1, 1.0)
    core.now = 50.0
    assert core.directory.expire(core.now) == 0
    assert core.answers()[tag].fault is None
    core.now = 51.5
    assert core.directory.expire(core.now) == 1


def test_expired_id_can_be_created_anew(core):
    core.create("again", idle_timeout_s=1.0)
    core.now = 2.0
    core.directory.expire(core.now)
    session = core.create("again")
    assert core.step(session, 1.0) == [11.0]


def test_full_house_refuses_with_a_retry_delay_and_drops_nothing(make_core):
    core = make_core(max_sessions=2)
    first, _ = core.create(), core.create()
    with pytest.raises(Refused) as refusal:
        core.create()
    assert refusal.value.fault.reason_name == "SESSIONS_EXHAUSTED"
    assert refusal.value.fault.retry_s > 0
    assert core.step(first, 1.0) == [11.0]


@pytest.mark.parametrize("session_id", ["a b", "x" * 129, "ü", "a\n"])
def test_unusable_ids_are_refused(core, session_id):
    with pytest.raises(Refused) as refusal:
        core.create(session_id)
    assert refusal.value.fault.reason_name == "SESSION_ID_INVALID"


def test_taken_id_is_refused(core):
    core.create("one")
    with pytest.raises(Refused) as refusal:
        core.create("one")
    assert refusal.value.fault.reason_name == "SESSION_EXISTS"


def test_draining_finishes_what_was_accepted_and_takes_nothing_new(core):
    session = core.create()
    accepted = core.send(session, 1, 1.0)
    core.directory.draining = True
    late = core.send(session, 2, 1.0)
    replay_of_pending = core.send(session, 1, 1.0)
    answers = core.answers()
    assert answers[accepted].fault is None
    assert answers[replay_of_pending].fault is None
    assert reason_of(answers[late]) == "DRAINING"
    for call in (core.create, lambda: core.directory.attach(session, "s", 1, core.now)):
        with pytest.raises(Refused) as refusal:
            call()
        assert refusal.value.fault.reason_name == "DRAINING"


def test_fork_goes_its_own_way(core):
    parent = core.create()
    core.step(parent, 1.0)
    child = core.directory.fork(parent, core.now)
    assert child.applied_seq == 1
    assert core.step(child, 5.0) == [16.0]
    assert core.step(parent, 1.0) == [12.0]
    tag = core.send(child, 1, 1.0)
    assert reason_of(core.answers()[tag]) == "STEP_ANSWER_EVICTED"
    core.check_slots()


def test_fork_of_a_fresh_session_is_fresh(core):
    child = core.directory.fork(core.create(), core.now)
    assert core.step(child, 1.0) == [11.0]


def test_fork_during_a_long_step_is_at_the_step_boundary(core):
    session = core.create()
    core.step(session, 1.0)
    core.send(session, 2, *[1.0] * 9)
    core.run_one()
    child = core.directory.fork(session, core.now)
    core.settle()
    assert core.step(child, 0.0) == [11.0]
    assert core.step(session, 0.0) == [20.0]


def test_close_all_of_an_engine(core):
    running, waiting, idle = core.create(), core.create(), core.create()
    core.send(running, 1, 1.0)
    batch = core.engine.next_batch(core.now)
    tag = core.send(waiting, 1, 1.0)
    assert core.directory.close_all(core.engine, session_pb2.DETACH_CAUSE_MODEL_UNLOADED, core.now) == 3
    (event,) = core.directory.take_events()
    assert event.reply_to == tag
    assert reason_of(event) == "SESSION_CLOSED"
    assert list(core.directory.sessions) == [running.id]
    core.directory.deliver(core.engine, batch, core.engine.run(batch), core.now)
    assert core.directory.sessions == {}
    assert core.directory.closed == {"model_unloaded": 3}
    with pytest.raises(Refused, match="model_unloaded"):
        core.directory.lookup(idle.id)
    with pytest.raises(Refused, match="model_unloaded"):
        core.directory.lookup(running.id)
    core.check_slots()


def test_many_postponed_deadlines_cost_one_entry(core):
    session = core.create()
    for _ in range(500):
        core.send(session, session.accepted_seq + 1, 1.0, timeout_s=30.0)
        core.settle()
    assert len(core.directory._late) == 1
    core.now = 100.0
    core.directory.expire(core.now)
    assert len(core.directory._late) == 0
    assert session.applied_seq == 500
    assert core.directory.next_expiry_at() < math.inf


def test_closed_sessions_are_held_by_nothing(core):
    for _ in range(500):
        session = core.create(idle_timeout_s=86_400.0)
        core.step(session, 1.0)
        core.directory.close(session, None, core.now)
        core.directory.take_events()
    del session
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Session and thing.engine is core.engine]
    assert len(core.directory._late) == 0
    assert len(core.directory._late._heap) <= 64
