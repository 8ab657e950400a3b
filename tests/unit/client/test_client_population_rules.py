"""The rules of a population's rows, one by one, without I/O."""

import numpy as np
import pytest
from client_rows import SIGNATURE, opened, step, totals
from conveyor._core.batch import prepare_batch, present_batch
from conveyor._core.member import Leaving
from conveyor.errors import ModelFailed, SessionExists, SessionNotFound, SessionTakenOver, StepAborted
from conveyor_proto.v1 import session_pb2 as pb


@pytest.fixture
def cable(new_cable):
    return new_cable()


def test_one_frame_carries_all_rows_and_says_what_was_answered(cable):
    population = opened(cable)
    step(population)
    cable.settle()
    step(population, rows=[2, 0])
    (request,) = cable.core.take_outgoing()
    frame = request.frame
    first = population.handles.start
    assert np.frombuffer(frame.handles, np.uint32).tolist() == [first + 2, first]
    assert np.frombuffer(frame.seqs, np.uint64).tolist() == [2, 2]
    assert np.frombuffer(frame.acked_seqs, np.uint64).tolist() == [1, 1]
    assert frame.lengths == b""


def test_rows_may_be_answered_in_any_company(cable):
    left, right = opened(cable, 2), cable.population(1, prefix="q")
    cable.settle()
    one, two = step(left, 1), step(right, 5)
    for _ in range(2):
        cable.pump_up()
    frames = [message.frame for message in cable.down]
    cable.down.clear()
    merged = pb.ResultFrame(
        handles=b"".join(frame.handles for frame in reversed(frames)),
        seqs=b"".join(frame.seqs for frame in reversed(frames)),
        columns=[b"".join(frame.columns[0] for frame in reversed(frames))],
    )
    cable.core.receive(pb.StreamResponse(frame=merged))
    assert (totals(one), totals(two)) == ([1, 1], [5])


def test_a_row_that_fails_stops_no_other(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("MODEL_FAILED")
    first, second = step(population), step(population)
    cable.settle()
    assert list(first.errors) == list(second.errors) == [1]
    assert isinstance(first.errors[1], ModelFailed)
    assert isinstance(second.errors[1], StepAborted)
    assert totals(second) == [2, 0, 2]
    third = step(population)
    cable.settle()
    assert totals(third) == [3, 1, 3]


def test_a_refused_row_waits_for_what_followed_it_and_the_others_do_not(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("MODEL_FAILED")
    first, second = step(population), step(population)
    cable.pump_up()
    while cable.down:
        cable.pump_down()
    assert first.ticket.done
    assert population.blocker(np.array([1])) is second.ticket
    assert population.blocker(np.array([0, 2])) is None


def test_a_refused_row_is_pipelined_again_once_all_is_told(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("MODEL_FAILED")
    step(population)
    cable.settle()
    step(population)
    assert population.blocker(np.array([1])) is None


def test_a_cut_after_a_refusal_aborts_what_followed_in_that_row_alone(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("MODEL_FAILED")
    first, second = step(population), step(population)
    cable.pump_up()
    while cable.down:
        cable.pump_down()
    assert list(first.errors) == [1]
    cable.cut()
    assert isinstance(second.errors[1], StepAborted)
    cable.settle()
    assert totals(second) == [2, 0, 2]
    assert [session.applied for session in cable.server.sessions.values()] == [2, 0, 2]


def test_a_draining_refusal_of_a_row_is_kept_for_the_next_stream(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("DRAINING")
    first, second = step(population), step(population)
    cable.settle()
    assert (totals(first), totals(second)) == ([1, 1, 1], [2, 2, 2])


def test_a_row_whose_session_is_lost_fails_from_then_on(cable, refused):
    population = opened(cable)
    waiting = step(population)
    cable.cut()
    cable.server.refuse_attach.append(refused("SESSION_NOT_FOUND", session_id="p0"))
    cable.settle()
    assert list(waiting.errors) == [0]
    assert isinstance(population.row_errors[0], SessionNotFound)
    later = step(population)
    cable.settle()
    assert list(later.errors) == [0]
    assert totals(later) == [0, 2, 2]
    only_lost = step(population, rows=[0])
    assert only_lost.ticket.done
    left = population.leave(Leaving.CLOSE)
    cable.settle()
    left.result()


def test_a_row_that_is_taken_over_is_told(cable):
    population = opened(cable)
    waiting = step(population)
    cable.core.take_outgoing()
    cable.end._let_go(population.handles[2], pb.DETACH_CAUSE_TAKEN_OVER)
    cable.pump_down()
    assert isinstance(waiting.errors[2], SessionTakenOver)
    assert not waiting.ticket.done


def test_all_open_or_none(cable):
    cable.session("p1")
    cable.settle()
    population = cable.population(3)
    cable.settle()
    with pytest.raises(SessionExists):
        population.opened.result()
    cable.core.forget_if_gone(population)
    assert cable.server.sessions.keys() == {"p1"}


def test_large_steps_travel_in_several_messages(cable):
    rows = 300
    population = opened(cable, rows)
    chunk = np.ones((rows, 1000, 2), np.float32)
    step = population.submit(np.arange(rows), prepare_batch(SIGNATURE, chunk, rows))
    requests = cable.core.take_outgoing()
    assert len(requests) == 3
    assert all(request.ByteSize() < 1 << 20 for request in requests)
    for request in requests:
        cable.end.receive(request)
    cable.settle()
    answers = present_batch(SIGNATURE, step.batch, step.pieces)
    assert answers.shape == (rows, 1000, 2)
    assert (answers[:, -1] == 1000).all()


def test_detaching_keeps_the_sessions(cable):
    population = opened(cable)
    step(population)
    left = population.leave(Leaving.DETACH)
    cable.settle()
    left.result()
    assert [session.applied for session in cable.server.sessions.values()] == [1, 1, 1]
    assert all(session.holder is None for session in cable.server.sessions.values())


def test_a_cut_detaches_all_rows(cable):
    population = opened(cable)
    left = population.leave(Leaving.DETACH)
    cable.cut()
    left.result()
