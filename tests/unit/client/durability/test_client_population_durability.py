"""The rules of a population's rows whose server has a store, one by one, without I/O."""

import numpy as np
import pytest
from client_rows import opened, step, totals
from client_steps import crash, pumped, until_done
from conveyor._core.member import Leaving
from conveyor.errors import NotDurable, SessionTakenOver, StepAborted, StepGap, StoreUnavailable
from conveyor_proto.v1 import session_pb2 as pb


def stepped(cable, population, count):
    for _ in range(count):
        step(population)
        pumped(cable)


def reattach(cable, population):
    """Has every attach granted and nothing else; returns what is sent then."""
    for _ in population.handles:
        cable.pump_up()
    for _ in population.handles:
        cable.pump_down()
    return cable.core.take_outgoing()


def rows_of(request):
    frame = request.frame
    columns = [np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)]
    return list(zip(*[column.tolist() for column in columns], strict=True))


def test_each_row_is_sent_what_its_server_lacks(cable, store):
    population = opened(cable)
    stepped(cable, population, 2)
    cable.server.checkpoint(cable.server.sessions["p1"])
    stepped(cable, population, 1)
    assert population.durable.tolist() == [0, 2, 0]
    waiting = step(population)
    crash(cable)
    outgoing = reattach(cable, population)
    first = population.handles.start
    assert [rows_of(request) for request in outgoing] == [
        [(first, 1), (first + 2, 1)],
        [(first, 2), (first + 2, 2)],
        [(first, 3), (first + 1, 3), (first + 2, 3)],
        [(first, 4), (first + 1, 4), (first + 2, 4)],
    ]
    acked = [np.frombuffer(request.frame.acked_seqs, np.uint64).tolist() for request in outgoing]
    assert acked == [[0, 0], [0, 0], [0, 2, 0], [0, 2, 0]]
    cable.cut()
    cable.settle()
    assert totals(waiting) == [4, 4, 4]
    assert population.acked.tolist() == [4, 4, 4]


@pytest.mark.parametrize("credit", [1, 2, 3])
def test_what_is_sent_again_stays_within_the_credit(cable, credit):
    cable.server.credit = credit
    population = opened(cable)
    stepped(cable, population, 10)
    crash(cable)
    outgoing, most = reattach(cable, population), 0
    while outgoing:
        most = max(most, len(outgoing))
        for request in outgoing:
            cable.end.receive(request)
        while cable.down:
            cable.pump_down()
        outgoing = [request for request in cable.core.take_outgoing() if request.HasField("frame")]
    assert most == credit
    assert [session.applied for session in cable.server.sessions.values()] == [10, 10, 10]


def test_a_new_step_waits_behind_what_is_sent_again(cable):
    cable.server.credit = 2
    population = opened(cable)
    stepped(cable, population, 5)
    crash(cable)
    assert len(reattach(cable, population)) == 2
    waiting = step(population)
    assert cable.core.take_outgoing() == []
    cable.cut()
    cable.settle()
    assert totals(waiting) == [6, 6, 6]


def test_rows_that_failed_are_not_sent_again(cable, refused):
    population = opened(cable)
    cable.server.failures["p1", 1] = refused("MODEL_FAILED")
    assert list(step(population).errors) == []
    cable.settle()
    stepped(cable, population, 1)
    crash(cable)
    outgoing = reattach(cable, population)
    first = population.handles.start
    assert [rows_of(request) for request in outgoing] == [
        [(first, 1), (first + 2, 1)],
        [(first, 2), (first + 1, 1), (first + 2, 2)],
    ]
    cable.cut()
    waiting = step(population)
    cable.settle()
    assert totals(waiting) == [3, 2, 3]


def test_rows_are_sent_again_in_their_order_whichever_frame_was_done_first(cable):
    population = opened(cable)
    both, one = step(population, rows=[0, 1]), step(population, rows=[0])
    for request in cable.core.take_outgoing():
        cable.end.receive(request)
    # Row 1 is answered by none that arrives, so the second frame is done before the first.
    frames = [message.frame for message in cable.down]
    cable.down.clear()
    mine = [frame for frame in frames if np.frombuffer(frame.handles, np.uint32)[0] == population.handles.start]
    for frame in mine:
        cable.core.receive(pb.StreamResponse(frame=frame))
    assert (both.ticket.done, one.ticket.done) == (False, True)
    crash(cable)
    first = population.handles.start
    again = [row for request in reattach(cable, population) for row in rows_of(request)]
    assert again == [(first, 1), (first + 1, 1), (first, 2)]
    cable.cut()
    cable.settle()
    assert totals(both) == [1, 1]
    assert cable.server.sessions["p0"].applied == 2


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_without_a_store_and_with_one_that_is_ahead_nothing_is_kept(new_cable, new_replicas, durability):
    cable = new_cable(new_replicas(1, durability)[0])
    population = opened(cable)
    stepped(cable, population, 3)
    step(population)
    assert not population.unstored
    assert not population._frames.kept
    assert population.durable.tolist() == [3 if durability == "sync" else 0] * 3


@pytest.mark.parametrize("form", ["alone", "framed"])
def test_what_is_stored_is_not_kept(cable, form):
    cable.server.form = form
    population = opened(cable)
    stepped(cable, population, 2)
    for session in cable.server.sessions.values():
        cable.server.checkpoint(session)
    stepped(cable, population, 1)
    assert population.durable.tolist() == [2, 2, 2]
    assert [kept.seqs.tolist() for kept, _ in population._frames.kept._kept] == [[3, 3, 3]]


def test_a_row_that_lags_holds_back_no_other_once_all_are_flushed(cable):
    population = opened(cable)
    step(population, rows=[0])
    pumped(cable)
    for _ in range(3):
        step(population, rows=[1, 2])
        pumped(cable)
    for row in (1, 2):
        cable.server.checkpoint(cable.server.sessions[f"p{row}"])
    step(population, rows=[1, 2])
    pumped(cable)
    assert len(population._frames.kept._kept) == 5
    flushed = population.flush()
    cable.settle()
    assert flushed.result().tolist() == [1, 4, 4]
    assert not population._frames.kept
    assert not population.unstored


def test_at_half_full_every_row_that_lags_is_flushed_once(cable):
    population = opened(cable, buffer_bytes=24 * 6)
    stepped(cable, population, 2)
    assert cable.server.flushes == []
    cable.server.checkpoint(cable.server.sessions["p2"])
    stepped(cable, population, 1)
    # Row 2's last step is not stored either.
    assert sorted(cable.server.flushes) == ["p0", "p1", "p2"]
    assert population.durable.tolist() == [3, 3, 3]
    stepped(cable, population, 1)
    assert len(cable.server.flushes) == 3


def test_a_full_buffer_holds_back_the_next_step_until_the_store_has_more(cable, store):
    population = opened(cable, buffer_bytes=24 * 2)
    store.away = True
    stepped(cable, population, 2)
    room = population.blocker(population.every_row)
    assert population.full
    assert room is not None
    assert population.busy
    store.away = False
    cable.settle()
    assert room.done
    assert population.blocker(population.every_row) is None


def test_a_row_that_is_gone_keeps_nothing(cable):
    population = opened(cable, rows=2)
    stepped(cable, population, 2)
    cable.server.checkpoint(cable.server.sessions["p0"])
    stepped(cable, population, 1)
    cable.server.checkpoint(cable.server.sessions["p0"])
    step(population, rows=[0])
    pumped(cable)
    cable.end._let_go(population.handles[1], pb.DETACH_CAUSE_TAKEN_OVER)
    pumped(cable)
    assert isinstance(population.row_errors[1], SessionTakenOver)
    flushed = population.flush()
    cable.settle()
    assert flushed.result()[0] == 4
    assert not population.unstored


def test_a_population_without_a_store_cannot_be_flushed(new_cable, new_replicas):
    population = opened(new_cable(new_replicas(1, "none")[0]))
    with pytest.raises(NotDurable, match="p0"):
        population.flush()


def test_a_flush_whose_answer_was_cut_off_is_told_by_the_next_attach(cable, store):
    population = opened(cable)
    stepped(cable, population, 3)
    flushed = population.flush()
    while cable.pump_up():
        pass
    assert [record.seq for record in store.records.values()] == [3, 3, 3]
    assert not flushed.done
    crash(cable)
    cable.settle()
    assert flushed.result().tolist() == [3, 3, 3]


def test_a_flush_that_was_cut_is_asked_for_again(cable):
    population = opened(cable)
    stepped(cable, population, 3)
    flushed = population.flush()
    crash(cable)
    cable.settle()
    assert flushed.result().tolist() == [3, 3, 3]


def test_a_row_whose_steps_the_store_lost_fails_and_no_other(cable, store):
    population = opened(cable)
    stepped(cable, population, 2)
    cable.server.checkpoint(cable.server.sessions["p1"])
    stepped(cable, population, 1)
    store.records["p1"].seq = 1
    waiting = step(population)
    crash(cable)
    cable.settle()
    assert list(waiting.errors) == [1]
    with pytest.raises(StepGap, match="No more is kept here of step 2"):
        raise population.row_errors[1]
    assert totals(waiting) == [4, 0, 4]


def test_a_row_that_cannot_be_brought_back_fails_and_no_other(cable, refused):
    population = opened(cable)
    stepped(cable, population, 3)
    waiting = step(population)
    crash(cable)
    cable.server.failures["p1", 2] = refused("INPUT_NON_FINITE", input="x")
    cable.settle()
    assert list(waiting.errors) == [1]
    assert isinstance(population.row_errors[1], StepGap)
    assert totals(waiting) == [4, 0, 4]


@pytest.mark.parametrize("reason", ["MODEL_FAILED", "OVERLOADED", "DRAINING"])
def test_a_passing_refusal_of_what_was_answered_is_nobodys_failure(cable, refused, reason):
    population = opened(cable)
    stepped(cable, population, 3)
    waiting = step(population)
    crash(cable)
    cable.server.failures["p1", 2] = refused(reason, retry_s=0.1)
    cable.settle()
    assert totals(waiting) == [4, 4, 4]
    assert population.row_errors == {}


def test_a_row_that_is_refused_again_and_again_fails_in_time_and_no_other(cable, refused):
    population = opened(cable)
    stepped(cable, population, 2)
    waiting = step(population)
    crash(cable)
    apply = type(cable.end)._apply

    def failing(self, session, seq, arrays, acked):
        if session.session_id == "p1":
            session.failed_seq = session.failed_seq or seq
            raise refused("MODEL_FAILED" if seq == 1 else "STEP_ABORTED", next_seq="1")
        return apply(self, session, seq, arrays, acked)

    cable.end._apply = failing.__get__(cable.end)
    assert 28 < until_done(cable, waiting.ticket) < 33
    assert isinstance(waiting.errors[1], StepGap)
    assert totals(waiting) == [3, 0, 3]


def test_an_opening_waits_for_the_store_for_a_while(cable, store):
    store.away = True
    population = cable.population(2)
    assert 3 < until_done(cable, population.opened) <= 5
    with pytest.raises(StoreUnavailable, match="gave up after 5 s"):
        population.opened.result()
    other = cable.population(2, prefix="q")
    pumped(cable)
    store.away = False
    cable.settle()
    other.opened.result()


def test_a_row_that_finds_no_place_after_its_server_was_lost_waits_for_one(cable, refused):
    population = opened(cable)
    stepped(cable, population, 2)
    waiting = step(population)
    crash(cable)
    cable.server.refuse_attach += [refused("SESSIONS_EXHAUSTED", retry_s=1.0, max_sessions="1")] * 5
    cable.settle()
    assert totals(waiting) == [3, 3, 3]


def test_a_row_whose_attach_is_refused_for_too_long_is_lost_and_no_other(cable, refused):
    population = opened(cable)
    stepped(cable, population, 1)
    waiting = step(population)
    crash(cable)
    attach = type(cable.server).attach

    def refusing(server, message):
        if message.session_id == "p1":
            raise refused("STORE_UNAVAILABLE", retry_s=1.0)
        return attach(server, message)

    cable.server.attach = refusing.__get__(cable.server)
    assert 28 < until_done(cable, waiting.ticket) < 33
    assert isinstance(population.row_errors[1], StoreUnavailable)
    assert totals(waiting) == [2, 0, 2]


def test_a_step_waits_for_the_store(new_cable, new_replicas):
    replica = new_replicas(1, "sync")[0]
    cable = new_cable(replica)
    population = opened(cable)
    replica.store.away = True
    steps = [step(population) for _ in range(3)]
    for _ in range(3):
        pumped(cable)
        assert cable.pump_time()
    replica.store.away = False
    cable.settle()
    assert [totals(each) for each in steps] == [[1] * 3, [2] * 3, [3] * 3]


def test_a_row_put_off_behind_one_that_failed_is_aborted(cable, refused):
    population = opened(cable)
    first, second = step(population), step(population)
    cable.core.take_outgoing()
    handle = population.handles[1]
    later, failed = refused("STORE_UNAVAILABLE", retry_s=0.1).status, refused("MODEL_FAILED", seq="1").status
    for seq, status in ((2, later), (1, failed)):
        cable.core.receive(pb.StreamResponse(error=pb.StepError(handle=handle, seq=seq, status=status)))
    cable.pump_time()
    assert list(first.errors) == [1]
    assert isinstance(second.errors[1], StepAborted)


def test_an_answer_may_come_before_that_of_a_step_that_was_put_off(cable, refused):
    population = opened(cable)
    first, second = step(population, rows=[0]), step(population, rows=[0])
    requests = cable.core.take_outgoing()
    status = refused("STORE_UNAVAILABLE", retry_s=0.1).status
    for request in requests:
        cable.end.receive(request)
    cable.down.popleft()
    error = pb.StepError(handle=population.handles[0], seq=1, status=status)
    cable.core.receive(pb.StreamResponse(error=error))
    cable.pump_down()
    assert (first.ticket.done, second.ticket.done) == (False, True)
    assert population.acked.tolist() == [0, 0, 0]
    cable.settle()
    assert (totals(first), totals(second)) == ([1], [2])
    assert population.acked.tolist() == [2, 0, 0]


def test_a_resume_token_goes_with_every_row(cable, replicas):
    opened(cable)
    cable.farewell("moved")
    while cable.down:
        cable.pump_down()
    cable.move(replicas[1])
    cable.settle()
    assert replicas[1].resume_tokens == ["moved"] * 3


def test_a_detach_that_was_cut_is_repeated_where_the_store_lacks_steps(cable, store):
    population = opened(cable)
    stepped(cable, population, 3)
    left = population.leave(Leaving.DETACH)
    crash(cable)
    assert not left.done
    cable.settle()
    left.result()
    assert [record.seq for record in store.records.values()] == [3, 3, 3]
    assert population.durable.tolist() == [3, 3, 3]


def test_a_detach_that_was_cut_is_done_where_the_store_lacks_nothing(cable):
    population = opened(cable)
    stepped(cable, population, 3)
    population.flush()
    cable.settle()
    left = population.leave(Leaving.DETACH)
    crash(cable)
    left.result()


def test_a_detach_waits_for_the_store(cable, store):
    population = opened(cable)
    stepped(cable, population, 2)
    store.away = True
    left = population.leave(Leaving.DETACH)
    pumped(cable)
    cable.pump_time()
    assert not left.done
    store.away = False
    cable.settle()
    left.result()
    assert [record.seq for record in store.records.values()] == [2, 2, 2]
