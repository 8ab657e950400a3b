"""Frames of sessions that are in the store alone."""

from collections.abc import Callable

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.transport import waiting
from flaky_store import FlakyStore
from stored import ASYNC, durable_seq, options

# Two servers of the fast transport need two loops.
with_two_servers = pytest.mark.asyncio(loop_factories=["aio"])


async def test_a_frame_behind_one_that_waits_waits_too(
    make_server: Callable, store: FlakyStore, make_frame: Callable
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.attached(2, "t")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    assert await durable_seq(stream, 1) == 1
    store.gate.clear()
    server.directory.passivate(server.directory.sessions["s"])
    server.driver.route()
    stream_call = server.directory.sessions["t"].attachment.owner
    # In one turn: the first is about one that is asleep and one that is not, the second about the latter alone.
    for handles, seqs in (([1, 2, 2], [2, 1, 2]), ([2], [3])):
        request = pb.StreamRequest(frame=make_frame(handles, seqs, [[1.0]] * len(seqs)))
        stream_call.receive(request.SerializeToString())
    store.gate.set()
    seen: list[tuple[int, int]] = []
    while len(seen) < 4:
        answered = await stream.expect("frame")
        handles = memoryview(answered.handles).cast("I").tolist()
        seen += zip(handles, memoryview(answered.seqs).cast("Q").tolist(), strict=True)
    assert sorted(seen) == [(1, 2), (2, 1), (2, 2), (2, 3)]


async def asleep(server, stream, *handles: int) -> None:
    """Has the sessions of these handles, which have stepped once, leave memory."""
    for handle in handles:
        await stream.attached(handle, f"s{handle}")
        await stream.answer(handle, 1, 1.0)
        await durable_seq(stream, handle)
        server.directory.passivate(server.directory.sessions[f"s{handle}"])
    server.driver.route()


@pytest.mark.parametrize("known", [False, True])
async def test_a_frame_of_several_that_do_not_come_back_is_refused_row_by_row(
    make_server: Callable, store: FlakyStore, known: bool
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await asleep(server, stream, 1, 2, 3)
    await stream.attached(4, "t")
    store.away = True
    if known:
        await stream.attach(5, "u")
        assert (await stream.fault())[2].reason == e.ERROR_REASON_STORE_UNAVAILABLE
    await stream.frame([1, 2, 4, 3], [2, 2, 1, 2], [[1.0]] * 4)
    refused = [await stream.fault() for _ in range(3)]
    assert sorted((handle, seq) for handle, seq, _ in refused) == [(1, 2), (2, 2), (3, 2)]
    assert {fault.reason for _, _, fault in refused} == {e.ERROR_REASON_STORE_UNAVAILABLE}
    assert memoryview((await stream.expect("frame")).handles).cast("I").tolist() == [4]
    store.away = False
    while True:
        await stream.step(1, 2, 1.0)
        if (await stream.receive()).HasField("result"):
            break
    assert await stream.answer(2, 2, 1.0) == [12.0]


async def test_a_frame_of_several_whose_records_are_not_whole_is_refused_row_by_row(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await asleep(server, stream, 1, 2)
    for name in ("s1", "s2"):
        store.inner._records[name] = store.inner._records[name]._replace(body=b"")
    await stream.frame([1, 2], [2, 2], [[1.0]] * 2)
    for _ in range(2):
        assert (await stream.fault())[2].reason == e.ERROR_REASON_RECORD_INVALID
    await stream.attached(4, "t")
    assert await stream.answer(4, 1, 1.0) == [11.0]


async def test_what_waits_for_the_store_is_bounded(make_server: Callable, store: FlakyStore, monkeypatch) -> None:
    monkeypatch.setattr(waiting, "_MOST", 4)
    server = await make_server(store=store, max_in_flight=64)
    stream = server.stream()
    store.gate.clear()
    await stream.attach(1, "s", options=options(ASYNC, max_in_flight=64))
    for seq in range(1, 8):
        await stream.step(1, seq, 1.0)
    for seq in (5, 6, 7):
        handle, refused, fault = await stream.fault()
        assert (handle, refused, fault.reason) == (1, seq, e.ERROR_REASON_CREDIT_EXCEEDED)
    store.gate.set()
    await stream.expect("attached")
    assert [(await stream.expect("result")).seq for _ in range(4)] == [1, 2, 3, 4]


async def test_a_frame_wakes_all_of_its_sessions_in_one_visit(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    handles = list(range(1, 31))
    await asleep(server, stream, *handles)
    store.calls.clear()
    await stream.frame(handles, [2] * len(handles), [[1.0]] * len(handles))
    answered = await stream.expect("frame")
    assert sorted(memoryview(answered.handles).cast("I").tolist()) == handles
    assert store.calls.count("load") <= 2


async def test_what_follows_a_step_that_the_store_kept_from_its_session_is_aborted(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await asleep(server, stream, 1)
    store.away = True
    await stream.step(1, 2, 1.0)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_STORE_UNAVAILABLE
    store.away = False
    # Once the store is back, a step that was sent behind that one is not the session's next, and no gap either.
    reason = e.ERROR_REASON_STORE_UNAVAILABLE
    while reason == e.ERROR_REASON_STORE_UNAVAILABLE:
        await stream.step(1, 3, 1.0)
        reason = (await stream.fault())[2].reason
    assert reason == e.ERROR_REASON_STEP_ABORTED
    await stream.frame([1], [3], [[1.0]])
    response = await stream.receive()
    assert response.HasField("errors") or response.HasField("error")
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await stream.answer(1, 3, 1.0) == [13.0]


async def test_a_refused_step_is_remembered_while_its_session_is_asleep(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s1")
    await stream.answer(1, 1, 1.0)
    await durable_seq(stream, 1)
    await stream.step(1, 2, float("nan"))
    assert (await stream.fault())[2].reason == e.ERROR_REASON_INPUT_NON_FINITE
    server.directory.passivate(server.directory.sessions["s1"])
    server.driver.route()
    await stream.step(1, 3, 1.0)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_STEP_ABORTED
    assert await stream.answer(1, 2, 1.0) == [12.0]
