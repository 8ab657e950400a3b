"""Every answer of a server that has a store says up to where its session is there; without one, none says anything."""

import numpy as np
import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.transport.loop import Driver

from tests.unit.transport.test_intake import FIRST, Paper, attach, step, told
from tests.unit.transport.test_turns_at_once import STREAMS, Single, Spy, Way, request, use_arrays

# Of the first session; of each that follows one more. Not what the steps' own numbers are.
BEGIN = (3 << 40) + 250


@pytest.fixture(params=[True, False], ids=["a store", "no store"])
def says(request, monkeypatch) -> bool:
    monkeypatch.setattr(Driver, "says_durable", property(lambda driver: request.param))
    return request.param


@pytest.fixture
async def server(says, make_server):
    return await make_server()


@pytest.fixture(params=["at once", "at once, by arrays", "elsewhere", "behind"])
def way_of(request, monkeypatch):
    return lambda server: Way(request.param, server, Spy(server, monkeypatch))


def store(server, sessions: int, begin: int = BEGIN) -> None:
    """As if the store had the sessions `s0`, `s1` and so on up to steps that are `begin` and more."""
    for index in range(sessions):
        session = server.directory.sessions[f"s{index}"]
        session.table.durable_seq[session.row] = begin + index


def said(response: pb.StreamResponse) -> list[int] | None:
    """What a result, or each row of a frame, says; None: nothing."""
    if response.HasField("frame"):
        durable_seqs = response.frame.durable_seqs
        return np.frombuffer(durable_seqs, np.uint64).tolist() if durable_seqs else None
    assert response.HasField("result"), response
    return [response.result.durable_seq] if response.result.HasField("durable_seq") else None


def gateway(server, sessions: int) -> Single:
    """A stream with sessions `s0`, `s1` and so on, under handles that are one more."""
    stream = Single(server, "s0")
    for index in range(1, sessions):
        attach(stream.call, stream.paper, 1 + index, "sum", f"s{index}")
    store(server, sessions)
    return stream


async def test_steps_of_many_streams_say_it_whichever_way_they_go(server, way_of, says) -> None:
    way, streams = way_of(server), [Single(server, f"s{index}") for index in range(STREAMS)]
    for seq, row in enumerate([[1.0], [1.0], [1.0, 2.0, 3.0]], 1):
        store(server, STREAMS, BEGIN * seq)
        await way.begin()
        for stream in streams:
            stream.call.receive(step(1, seq, *row))
        await way.end()
        answers = [said(*await stream.paper.take(1)) for stream in streams]
        assert answers == [[BEGIN * seq + index] if says else None for index in range(STREAMS)]
    way.went(*[STREAMS] * 3)


async def test_frames_say_it_of_each_row_whichever_way_they_go(server, way_of, says, make_frame) -> None:
    way, stream = way_of(server), gateway(server, STREAMS)
    handles = list(range(STREAMS, 0, -1))
    for seq, row in enumerate([[1.0], [1.0], [1.0, 2.0, 3.0]], 1):
        await way.begin()
        stream.call.receive(request(make_frame(handles, [seq] * STREAMS, [row] * STREAMS)))
        await way.end()
        (answer,) = await stream.paper.take(1)
        assert np.frombuffer(answer.frame.handles, np.uint32).tolist() == handles
        assert said(answer) == ([BEGIN + handle - 1 for handle in handles] if says else None)
    way.went(*[STREAMS] * 3)


async def test_a_trains_steps_all_say_the_same(make_server, says, way_of, make_frame) -> None:
    server = await make_server(timed=True)
    way, stream = way_of(server), gateway(server, 1)
    await way.begin()
    stream.call.receive(request(make_frame([1] * 3, [1, 2, 3], [[1.0], [2.0], [3.0]])))
    await way.end()
    (answer,) = await stream.paper.take(1)
    assert np.frombuffer(answer.frame.seqs, np.uint64).tolist() == [1, 2, 3]
    assert said(answer) == ([BEGIN] * 3 if says else None)
    way.went(1)


@pytest.mark.parametrize("sessions", [1, 2], ids=["of the only session", "of one of several"])
async def test_a_lone_step_says_it_whichever_way_it_goes(server, way_of, says, sessions) -> None:
    way, stream = way_of(server), gateway(server, sessions)
    for seq, row in enumerate([[1.0], [1.0], [1.0, 2.0, 3.0]], 1):
        await way.begin()
        stream.call.receive(step(sessions, seq, *row))
        await way.end()
        assert said(*await stream.paper.take(1)) == ([BEGIN + sessions - 1] if says else None)
    way.went(1, 1, 1)


async def test_rows_that_go_alone_say_it_in_their_frame(server, says, make_frame) -> None:
    stream = gateway(server, 3)
    stream.call.receive(request(make_frame([3, 1, 2], [1] * 3, [[1.0], [1.0, 1.0], [1.0] * 9])))
    rows = {}
    while len(rows) < 3:
        (answer,) = await stream.paper.take(1)
        handles = np.frombuffer(answer.frame.handles, np.uint32).tolist()
        rows |= zip(handles, said(answer) or [None] * len(handles), strict=True)
    assert rows == {handle: BEGIN + handle - 1 if says else None for handle in (1, 2, 3)}


async def test_answers_from_the_record_say_where_the_session_is_now(server, says, make_frame) -> None:
    stream = gateway(server, 2)
    stream.call.receive(step(1, 1, 1.0))
    stream.call.receive(request(make_frame([2], [1], [[1.0]])))
    await stream.paper.take(2)
    store(server, 2, 2 * BEGIN)
    stream.call.receive(step(1, 1, 1.0))
    (alone,) = await stream.paper.take(1)
    stream.call.receive(request(make_frame([2, 1], [1, 1], [[1.0], [1.0]])))
    (framed,) = await stream.paper.take(1)
    assert alone.result.replayed
    assert np.frombuffer(framed.frame.replayed_rows, np.uint32).tolist() == [0, 1]
    assert said(alone) == ([2 * BEGIN] if says else None)
    assert said(framed) == ([2 * BEGIN + 1, 2 * BEGIN] if says else None)


@pytest.mark.parametrize("framed", [False, True], ids=["steps", "frames"])
async def test_what_went_on_together_behind_a_run_says_it(server, monkeypatch, says, make_frame, framed) -> None:
    """Steps of several turns wait, and are joined; what is said is what is so when they are answered."""
    use_arrays(server)
    way, stream = Way("behind", server, Spy(server, monkeypatch)), gateway(server, 6)
    await way.begin()
    for seq in (1, 2):
        for handles in ([1, 2, 3], [4, 5, 6]):
            if framed:
                stream.call.receive(request(make_frame(handles, [seq] * 3, [[1.0]] * 3)))
            else:
                for handle in handles:
                    stream.call.receive(step(handle, seq, 1.0))
            way.spy.offered.clear()
            await way.spy.offered.wait()
    store(server, 6, 2 * BEGIN)
    await way.end()
    rows: list[tuple[int, int | None]] = []
    while len(rows) < 12:
        (answer,) = await stream.paper.take(1)
        handles = np.frombuffer(answer.frame.handles, np.uint32).tolist() if framed else [answer.result.handle]
        rows += zip(handles, said(answer) or [None] * len(handles), strict=True)
    expected = [(handle, 2 * BEGIN + handle - 1 if says else None) for handle in range(1, 7)]
    assert sorted(rows, key=str) == sorted(expected * 2, key=str)
    assert server.runner.rows == [1, 6, 6]


async def test_a_session_that_was_never_stored_says_so(server, says) -> None:
    """A number that is 0 is said too: it is not the same as saying nothing."""
    paper = Paper()
    call = server.grpc._streams.enter(paper, {})
    attach(call, paper, 1, "sum", "s0")
    call.receive(step(1, 1, 1.0))
    (answer,) = await paper.take(1)
    assert told(answer) == [FIRST + 1]
    assert said(answer) == ([0] if says else None)
