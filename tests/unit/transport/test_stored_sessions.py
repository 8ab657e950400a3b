"""Sessions that are kept in a store, as their clients see them: durable, resumed elsewhere, fenced, asleep."""

from collections.abc import Callable

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper import writes
from flaky_store import FlakyStore
from stored import ASYNC, NONE, SYNC, durable_seq, options, policy, turn

# Two servers of the fast transport need two loops.
with_two_servers = pytest.mark.asyncio(loop_factories=["aio"])


async def test_a_session_that_does_not_say_is_async_and_says_so(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    attached = await stream.attached(1, "s")
    assert attached.session.durability == ASYNC
    assert store.inner.load([("s", 0)])[0].epoch == attached.session.epoch
    assert attached.session.resident
    assert await stream.answer(1, 1, 1.0) == [11.0]
    assert await durable_seq(stream, 1) == 1
    assert store.inner.load([("s", 0)])[0].seq == 1


@with_two_servers
async def test_a_session_goes_on_elsewhere_from_where_the_store_has_it(
    make_server: Callable, store: FlakyStore
) -> None:
    one, two = await make_server(store=store), await make_server(store=store, folder="b", policy=policy("r2"))
    first = one.stream()
    begun = await first.attached(1, "s")
    assert await first.answer(1, 1, 1.0, 2.0) == [11.0, 13.0]
    assert await first.answer(1, 2, 4.0) == [17.0]
    await first.send(detach=pb.DetachSession(handle=1))
    assert (await first.expect("detached")).applied_seq == 2
    second = two.stream()
    attached = await second.attached(7, "s", mode=pb.AttachSession.MODE_RESUME, model="")
    assert attached.resumed
    assert (attached.session.applied_seq, attached.session.epoch) == (2, begun.session.epoch + 1)
    assert attached.session.applied_time_steps == 3
    assert await second.answer(7, 3, 8.0) == [25.0]


@with_two_servers
async def test_answers_that_were_not_acknowledged_are_replayed_elsewhere(
    make_server: Callable, store: FlakyStore
) -> None:
    one, two = await make_server(store=store), await make_server(store=store, folder="b", policy=policy("r2"))
    first = one.stream()
    await first.attached(1, "s")
    await first.answer(1, 1, 1.0, 2.0)
    await first.answer(1, 2, 4.0)
    await durable_seq(first, 1)
    second = two.stream()
    await second.attached(1, "s", mode=pb.AttachSession.MODE_RESUME)
    for seq, values, totals in ((1, (1.0, 2.0), [11.0, 13.0]), (2, (4.0,), [17.0])):
        await second.step(1, seq, *values)
        result = await second.expect("result")
        assert result.replayed
        assert [float(x) for x in memoryview(result.outputs[0].data).cast("d")] == totals


@with_two_servers
async def test_who_lost_a_session_to_another_server_is_told_at_its_next_write(
    make_server: Callable, store: FlakyStore
) -> None:
    one, two = await make_server(store=store), await make_server(store=store, folder="b", policy=policy("r2"))
    first, second = one.stream(), two.stream()
    await first.attached(1, "s")
    await second.attached(1, "s", mode=pb.AttachSession.MODE_RESUME)
    await first.step(1, 1, 5.0)
    assert (await first.expect("result")).seq == 1
    detached = await first.expect("detached")
    assert detached.cause == pb.DETACH_CAUSE_TAKEN_OVER
    assert await second.answer(1, 1, 1.0) == [11.0]


@with_two_servers
async def test_a_sync_answer_of_who_lost_a_session_never_leaves(make_server: Callable, store: FlakyStore) -> None:
    one, two = await make_server(store=store), await make_server(store=store, folder="b", policy=policy("r2"))
    first, second = one.stream(), two.stream()
    await first.attached(1, "s", options=options(SYNC))
    assert await first.answer(1, 1, 1.0) == [11.0]
    assert store.inner.load([("s", 0)])[0].seq == 1
    await second.attached(1, "s", mode=pb.AttachSession.MODE_RESUME)
    await first.step(1, 2, 5.0)
    assert (await first.expect("detached")).cause == pb.DETACH_CAUSE_TAKEN_OVER
    assert await second.answer(1, 2, 2.0) == [13.0]


async def test_a_sync_answer_waits_for_the_store(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s", options=options(SYNC))
    store.gate.clear()
    await stream.step(1, 1, 1.0)
    while server.directory.sessions["s"].applied_seq < 1:
        await turn()
    assert server.directory.sessions["s"].durable_seq == 0
    store.gate.set()
    await stream.expect("result")
    assert server.directory.sessions["s"].durable_seq == 1
    assert store.inner.load([("s", 0)])[0].seq == 1


async def test_a_detach_waits_until_the_store_has_all(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(checkpoint_s=100.0))
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.answer(1, 1, 1.0)
    assert store.inner.load([("s", 0)])[0].seq == 0
    await stream.end()
    assert store.inner.load([("s", 0)])[0].seq == 1


async def test_a_close_removes_the_record_before_it_is_told(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.answer(1, 1, 1.0)
    await stream.send(close=pb.CloseAttachedSession(handle=1))
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_CLOSED
    assert store.inner.count() == 0
    await stream.attach(2, "s", mode=pb.AttachSession.MODE_RESUME)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_SESSION_CLOSED


async def test_idle_sessions_leave_memory_and_come_back_with_their_next_step(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store, policy=policy(passivate_after_s=0.05))
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.attached(2, "t", options=options(NONE))
    assert await stream.answer(1, 1, 1.0) == [11.0]
    while "s" in server.directory.sessions:
        await turn()
    assert "s" in server.directory.asleep
    assert "t" in server.directory.sessions
    assert await stream.answer(1, 2, 2.0) == [13.0]
    assert "s" in server.directory.sessions
    while "s" in server.directory.sessions:
        await turn()
    await stream.frame([1, 2, 1], [3, 1, 4], [[1.0], [1.0], [2.0]])
    seen = []
    while len(seen) < 3:
        answered = await stream.expect("frame")
        seen += memoryview(answered.handles).cast("I").tolist()
    assert sorted(seen) == [1, 1, 2]
    assert server.directory.sessions["s"].applied_seq == 4


async def test_the_least_recently_used_make_room(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, max_sessions=4, policy=policy(passivate_after_s=1e9))
    stream = server.stream()
    for handle in range(1, 9):
        await stream.attached(handle, f"s{handle}")
        assert await stream.answer(handle, 1, float(handle)) == [10.0 + handle]
    assert len(server.directory.sessions) <= 4
    for handle in range(1, 9):
        assert await stream.answer(handle, 2, 1.0) == [11.0 + handle]


async def test_where_nobody_can_leave_a_new_session_is_refused(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, max_sessions=2)
    stream = server.stream()
    await stream.attached(1, "a", options=options(NONE))
    await stream.attached(2, "b", options=options(NONE))
    await stream.attach(3, "c")
    _, _, fault = await stream.fault()
    assert fault.reason == e.ERROR_REASON_SESSIONS_EXHAUSTED
    assert fault.retry_s
    assert store.inner.count() == 0


@with_two_servers
async def test_what_the_server_does_not_offer_is_refused(make_server: Callable, store: FlakyStore) -> None:
    plain = await make_server()
    stream = plain.stream()
    await stream.attach(1, "a", options=options(ASYNC))
    assert (await stream.fault())[2].reason == e.ERROR_REASON_NOT_DURABLE
    bounded = await make_server(store=store, folder="b", policy=policy(most=ASYNC, least=ASYNC))
    stream = bounded.stream()
    await stream.attach(1, "a", options=options(SYNC))
    assert (await stream.fault())[2].reason == e.ERROR_REASON_NOT_DURABLE
    assert (await stream.attached(1, "a", options=options(NONE))).session.durability == ASYNC


@with_two_servers
async def test_unary_calls_find_sessions_in_the_store(make_server: Callable, store: FlakyStore, make_tensor) -> None:
    one, two = await make_server(store=store), await make_server(store=store, folder="b", policy=policy("r2"))
    created = await one.stub.CreateSession(pb.CreateSessionRequest(model="sum", session_id="s", options=options(SYNC)))
    assert created.session.durability == SYNC
    answer = await one.stub.Step(pb.StepRequest(session_id="s", seq=1, inputs=[make_tensor(1.0)]))
    assert answer.durable_seq == 1
    info = (await two.stub.GetSession(pb.GetSessionRequest(session_id="s"))).session
    assert (info.applied_seq, info.resident, info.epoch) == (1, False, created.session.epoch)
    answer = await two.stub.Step(pb.StepRequest(session_id="s", seq=2, inputs=[make_tensor(2.0)]))
    assert memoryview(answer.outputs[0].data).cast("d")[0] == 13.0
    listed = await one.stub.ListSessions(pb.ListSessionsRequest())
    assert [(item.session_id, item.applied_seq) for item in listed.sessions] == [("s", 2)]
    forked = await one.stub.ForkSession(pb.ForkSessionRequest(session_id="s", new_session_id="f"))
    assert forked.session.applied_seq == 2
    assert store.inner.load([("f", 0)])[0].seq == 2
    await two.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
    assert store.inner.load([("s", 0)])[0] == ()


@pytest.mark.parametrize("limit", ["_MOST_ROWS", "_MOST_BYTES"])
async def test_sync_answers_wait_for_their_own_job_where_there_is_too_much_for_one(
    make_server: Callable, store: FlakyStore, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(writes, limit, 1)
    server = await make_server(store=store)
    stream, other = server.stream(), server.stream()
    for handle in (1, 2, 3):
        await stream.attached(handle, f"s{handle}", options=options(SYNC))
        # Kinds of their own: of each, the record has another number of answers.
        for seq in range(1, handle):
            await stream.answer(handle, seq, 1.0)
    await other.attached(4, "s4", options=options(ASYNC))
    store.gate.clear()
    await other.step(4, 1, 1.0)
    for handle in (1, 2, 3):
        await stream.step(handle, handle, 1.0)
    while server.directory.sessions["s3"].applied_seq < 3:
        await turn()
    store.gate.set()
    for _ in range(3):
        result = await stream.expect("result")
        assert store.inner.load([(f"s{result.handle}", 0)])[0].seq == result.seq
