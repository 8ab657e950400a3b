"""Quotas in the store: of all sessions, of a model's and of a tenant's, whoever creates them and however."""

from collections.abc import Callable

import grpc
import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc
from flaky_store import FlakyStore
from stored import NONE, options, policy

TENANT = (("x-tenant-id", "acme"),)


def stream_of(server, metadata: tuple[tuple[str, str], ...]):
    """A stream whose client sends metadata ahead."""
    stream = server.stream()
    stream.call.cancel()
    stub = session_pb2_grpc.SessionServiceStub(server.channel)  # type: ignore[no-untyped-call]
    return type(stream)(stub.Stream(metadata=metadata))


async def refusal(stream, handle: int, **fields: object):
    await stream.attach(handle, f"s{handle}", **fields)
    _, _, fault = await stream.fault()
    assert fault.reason == e.ERROR_REASON_SESSIONS_EXHAUSTED
    assert fault.retry_s
    return fault


async def test_the_store_holds_so_many_sessions_and_no_more(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(max_stored=2))
    stream = server.stream()
    await stream.attached(1, "s1")
    await stream.attached(2, "s2", model="other")
    assert (await refusal(stream, 3)).metadata["max_sessions"] == "2"
    await stream.attached(4, "s4", options=options(NONE))
    await stream.send(close=pb.CloseAttachedSession(handle=1))
    await stream.expect("detached")
    await stream.attached(3, "s3")


async def test_a_model_has_so_many(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(max_per_model=1))
    stream = server.stream()
    await stream.attached(1, "s1")
    await stream.attached(2, "s2", model="other")
    assert "model 'sum'" in (await refusal(stream, 3)).message


async def test_a_tenant_has_so_many_by_streams_and_by_calls(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store, policy=policy(max_per_tenant=2))
    acme, others = stream_of(server, TENANT), server.stream()
    await acme.attached(1, "s1")
    await server.stub.CreateSession(pb.CreateSessionRequest(model="sum", session_id="s2"), metadata=TENANT)
    assert "tenant 'acme'" in (await refusal(acme, 3)).message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.CreateSession(pb.CreateSessionRequest(model="sum"), metadata=TENANT)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.ForkSession(pb.ForkSessionRequest(session_id="acme/s1"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "a copy is its tenant's too"
    for handle in (4, 5, 6):
        await others.attached(handle, f"s{handle}")
