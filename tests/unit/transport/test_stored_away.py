"""Stores that are away, and records that are not whole: who goes on, and what the others are told."""

import asyncio
from collections.abc import Callable

import pytest
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from flaky_store import FlakyStore
from stored import SYNC, durable_seq, options, policy, turn

# Two servers of the fast transport need two loops.
with_two_servers = pytest.mark.asyncio(loop_factories=["aio"])


async def test_while_the_store_is_away_async_goes_on_and_sync_is_told(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(sync_patience_s=0.1, max_undurable_s=1e9))
    one, two = server.stream(), server.stream()
    await one.attached(1, "a")
    await two.attached(1, "b", options=options(SYNC))
    store.away = True
    assert await one.answer(1, 1, 1.0) == [11.0]
    await two.step(1, 1, 1.0)
    _, seq, fault = await two.fault()
    assert (seq, fault.reason) == (1, e.ERROR_REASON_STORE_UNAVAILABLE)
    assert await one.answer(1, 2, 1.0) == [12.0]
    store.away = False
    assert await durable_seq(one, 1) == 2
    await two.step(1, 1, 1.0)
    while (await two.receive()).HasField("error"):
        await two.step(1, 1, 1.0)
    assert store.inner.load([("b", 0)])[0].seq == 1
    assert await two.answer(1, 2, 1.0) == [12.0]


async def test_async_stops_where_the_store_stays_away(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(max_undurable_s=0.05))
    stream = server.stream()
    await stream.attached(1, "a")
    store.away = True
    seq, fault = 1, Fault(e.ERROR_REASON_UNSPECIFIED, "")
    while fault.reason == e.ERROR_REASON_UNSPECIFIED:
        await stream.step(1, seq, 1.0)
        response = await stream.receive()
        if response.HasField("error"):
            fault = from_status(response.error.status)
        else:
            seq += 1
            await turn()
    assert fault.reason == e.ERROR_REASON_STORE_UNAVAILABLE
    assert fault.retry_s
    store.away = False
    while True:
        await stream.step(1, seq, 1.0)
        if (await stream.receive()).HasField("result"):
            break
    assert await durable_seq(stream, 1) == seq


@with_two_servers
async def test_a_record_that_is_not_whole_is_refused_by_name(make_server: Callable, store: FlakyStore) -> None:
    one = await make_server(store=store)
    stream = one.stream()
    await stream.attached(1, "s")
    await stream.answer(1, 1, 1.0)
    await stream.end()
    record = store.inner.load([("s", 0)])[0]
    two = await make_server(store=store, folder="b", policy=policy("r2"))
    for body in (record.body[:-1], record.body[:50] + b"\x01" + record.body[51:], b""):
        store.inner._records["s"] = record._replace(body=body)
        stream = two.stream()
        await stream.attach(1, "s", mode=pb.AttachSession.MODE_RESUME)
        _, _, fault = await stream.fault()
        assert fault.reason == e.ERROR_REASON_RECORD_INVALID
        assert "'s'" in fault.message


async def test_a_server_that_stood_still_lets_nobody_in_who_has_asked_meanwhile(
    make_server: Callable, store: FlakyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    attached = await stream.attached(1, "s")
    await stream.end()
    beat = server.driver.store
    monkeypatch.setattr(beat, "_seen_at", beat._seen_at - 5.0)
    other = server.stream()
    await other.attach(1, "s", mode=pb.AttachSession.MODE_RESUME)
    _, _, fault = await other.fault()
    assert (fault.reason, "stood still" in fault.message) == (e.ERROR_REASON_STORE_UNAVAILABLE, True)
    assert store.inner.load([("s", 0)])[0].epoch == attached.session.epoch
    async with asyncio.timeout(10):
        while True:
            await other.attach(1, "s", mode=pb.AttachSession.MODE_RESUME)
            if (await other.receive()).HasField("attached"):
                break
            await asyncio.sleep(0.05)
