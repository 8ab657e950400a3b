"""Health checks and reflection beside the streams, on both transports."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVICES = ("", "conveyor.v1.SessionService", "conveyor.v1.ModelService")


@pytest.fixture
def health(server):
    return health_pb2_grpc.HealthStub(server.channel)


def request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_check_follows_what_the_server_says(server, health) -> None:
    for serving, status in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
        await server.grpc.say(serving=serving)
        assert [(await health.Check(request(service))).status for service in SERVICES] == [status] * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(request("conveyor.v1.Nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_more_watchers_than_threads_are_all_told_and_keep_nobody_waiting(server, health) -> None:
    watchers = [health.Watch(request(SERVICES[index % 3])) for index in range(60)]
    unknown = health.Watch(request("conveyor.v1.Nothing"))
    assert [(await watcher.read()).status for watcher in watchers] == [SERVING] * 60
    assert (await unknown.read()).status == UNKNOWN
    for serving, status in ((False, NOT_SERVING), (True, SERVING)):
        await asyncio.wait_for(server.grpc.say(serving=serving), 20)
        assert [(await watcher.read()).status for watcher in watchers] == [status] * 60
        assert (await health.Check(request(""))).status == status
    stream = server.stream()
    await stream.attached(1)
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.end()
    # Some leave while others are told.
    for watcher in watchers[::2]:
        watcher.cancel()
    await asyncio.wait_for(server.grpc.say(serving=False), 20)
    assert [(await watcher.read()).status for watcher in watchers[1::2]] == [NOT_SERVING] * 30


async def test_those_who_stay_are_told_after_one_has_left(server, health) -> None:
    gone, stays = health.Watch(request("")), health.Watch(request(""))
    assert (await gone.read()).status == (await stays.read()).status == SERVING
    gone.cancel()
    # The server has heard of it when it has answered what came after it on the same connection, and let others run.
    for _ in range(3):
        await health.Check(request(""))
    await server.grpc.say(serving=False)
    assert (await asyncio.wait_for(stays.read(), 20)).status == NOT_SERVING


async def test_reflection_names_and_describes_the_services(server) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    ask = reflection_pb2.ServerReflectionRequest
    call = stub.ServerReflectionInfo(
        iter([ask(list_services=""), ask(file_containing_symbol="conveyor.v1.SessionService")])
    )
    listed = await call.read()
    names = {service.name for service in listed.list_services_response.service}
    assert set(SERVICES[1:]) | {"grpc.health.v1.Health"} <= names
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
