"""Sequences of a server with a store: they go on elsewhere, begin anew wherever they were, and may be SYNC."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from conveyor_proto.v1 import session_pb2
from conveyor_server.inference.sequence import RESTARTED
from conveyor_server.store.contract import Claim
from flaky_store import FlakyStore
from stored import policy

from tests.unit.inference.conftest import Client, totals, until
from tests.unit.transport.test_intake import FIRST


def client_of(server) -> Client:
    return Client(server.channel)


def taken_elsewhere(store: FlakyStore, name: str) -> None:
    """Another server takes the session."""
    store.inner.take([Claim(name, "r2", "a runtime", 2e9)])


async def test_a_sequence_is_a_stored_session(make_server: Callable, store: FlakyStore) -> None:
    client = client_of(await make_server(store=store, policy=policy(default=session_pb2.DURABILITY_SYNC)))
    assert totals(await client.infer(1.0, sequence=5, start=True)) == [FIRST + 1]
    assert store.inner.load([("sum:5", 0)])[0].seq == 1
    assert totals(await client.infer(2.0, sequence=5, end=True)) == [FIRST + 3]
    assert store.inner.count() == 0


async def test_a_sequence_that_is_in_the_store_alone_goes_on(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(passivate_after_s=0.02))
    client = client_of(server)
    await client.infer(1.0, sequence=5, start=True)
    await until(lambda: not server.directory.sessions)
    assert totals(await client.infer(2.0, sequence=5)) == [FIRST + 3]


async def test_requests_wait_in_order_for_a_sequence_that_comes_from_the_store(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store, policy=policy(passivate_after_s=0.02))
    client = client_of(server)
    await client.infer(1.0, sequence=5, start=True)
    await until(lambda: not server.directory.sessions)
    store.gate.clear()
    calls = [asyncio.ensure_future(client.infer(float(value), sequence=5)) for value in (2, 3, 4)]
    await until(lambda: server.driver.store._busy)
    store.gate.set()
    assert [totals(await call) for call in calls] == [[FIRST + 3], [FIRST + 6], [FIRST + 10]]


async def test_a_live_sequence_that_another_server_has_begins_anew_here(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store, policy=policy(passivate_after_s=0.02))
    client = client_of(server)
    await client.infer(1.0, sequence=5, start=True)
    await until(lambda: not server.directory.sessions)
    taken_elsewhere(store, "sum:5")
    response = await client.infer(7.0, sequence=5, start=True)
    assert totals(response) == [FIRST + 7]
    assert response.parameters[RESTARTED].int64_param == 1
    assert totals(await client.infer(1.0, sequence=5)) == [FIRST + 8]


async def test_a_sequence_that_was_never_begun_is_refused(make_server: Callable, store: FlakyStore) -> None:
    client = client_of(await make_server(store=store))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.infer(1.0, sequence=9)
    assert "must specify the START flag" in caught.value.details()


async def test_a_sync_sequence_of_another_server_gets_no_answer_here(make_server: Callable, store: FlakyStore) -> None:
    client = client_of(await make_server(store=store, policy=policy(default=session_pb2.DURABILITY_SYNC)))
    await client.infer(1.0, sequence=5, start=True)
    taken_elsewhere(store, "sum:5")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.infer(2.0, sequence=5)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert totals(await client.infer(2.0, sequence=5)) == [FIRST + 3], "found where it is, as the store has it"


async def test_while_the_store_is_away_a_sync_sequence_is_told(make_server: Callable, store: FlakyStore) -> None:
    sync = policy(default=session_pb2.DURABILITY_SYNC, sync_patience_s=0.05)
    client = client_of(await make_server(store=store, policy=sync))
    await client.infer(1.0, sequence=5, start=True)
    store.away = True
    for sequence, start in ((5, False), (6, True)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(2.0, sequence=sequence, start=start)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
