"""ModelInfer without a thread of its own: one request, one answer, whatever a client makes of it."""

import asyncio

import grpc
import pytest

from tests.unit.inference.conftest import SERVICE, totals, until
from tests.unit.transport.test_intake import FIRST

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])


def raw(server) -> grpc.aio.StreamStreamCall:
    """A call of ModelInfer by which anything can be sent."""
    return server.channel.stream_stream(f"{SERVICE}ModelInfer")()


async def ended(call: grpc.aio.StreamStreamCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read(), 20)
    return caught.value.code(), caught.value.details()


@on_the_queue
async def test_calls_that_come_together_are_run_together(client, server) -> None:
    server.runner.gate.clear()
    first = asyncio.create_task(client.infer(1.0, sequence=100, start=True))
    await server.run_entered()
    others = [asyncio.create_task(client.infer(float(n), sequence=n, start=True)) for n in range(1, 31)]
    await until(lambda: server.engine.ready == 30)
    # None of them has a thread: more wait than there are.
    server.runner.gate.set()
    await first
    for number, other in enumerate(others, 1):
        assert totals(await other) == [FIRST + number]
    assert server.runner.rows == [1, 30]
    await server.no_streams()


@on_the_queue
@pytest.mark.parametrize(("sent", "text"), [(b"\xff\xff", "no ModelInferRequest"), (None, "none came")])
async def test_what_is_no_request_is_refused(server, sent, text) -> None:
    call = raw(server)
    if sent is not None:
        await call.write(sent)
    await call.done_writing()
    code, told = await ended(call)
    assert (code, text in told) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    await server.no_streams()


@on_the_queue
async def test_a_drain_waits_for_the_calls_under_way(client, server) -> None:
    server.runner.gate.clear()
    call = asyncio.create_task(client.infer(1.0, sequence=5, start=True))
    await server.run_entered()
    server.directory.draining = True
    now = server.driver.now()
    drained = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    await asyncio.sleep(0.05)
    assert not drained.done()
    server.runner.gate.set()
    assert totals(await call) == [FIRST + 1]
    assert await drained
