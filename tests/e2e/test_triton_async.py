"""tritonclient's asyncio client against the real server: calls, streams, and callers that give up."""

import asyncio
import contextlib

import conveyor.aio
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from by_hand import ByHand
from triton_user import WAIT_S, answer, given, interleaved, parameters, scripts

from tests.e2e.conftest import FEATURES

X = np.random.default_rng(23).standard_normal((8, FEATURES)).astype(np.float32)
# Of a step that takes a second or more where a run takes one time step of it.
LONG = np.random.default_rng(24).standard_normal((10_000, FEATURES)).astype(np.float32)
SLOW = ("--quantum", "1", "--max-time-steps", str(len(LONG)))


@pytest.fixture
async def client(start_server, transport):
    server = start_server(*SLOW)
    async with grpcclient.InferenceServerClient(server.target) as client:
        yield client


@pytest.fixture
def hand(nets):
    return ByHand(nets.folder / "gru" / "1" / "model.onnx")


async def reads(client):
    """Requests whose tensors were read."""
    statistics = await client.get_inference_statistics("gru")
    return statistics.model_stats[0].inference_stats.compute_input.count


async def arrived(client, count):
    """Returns when the server has read so many requests."""
    async with asyncio.timeout(WAIT_S):
        while await reads(client) < count:
            pass


async def test_sequences_by_calls_at_once(client, hand):
    async def play(script):
        for index in range(len(script.steps)):
            result = await client.infer("gru", **script.request(index))
            assert result.get_response().id == f"{script.id!r}/{index}"
            script.answers.append(answer(result))

    everyone = scripts([*range(1, 25), "one", "two"], FEATURES, seed=1)
    await asyncio.gather(*map(play, everyone))
    for script in everyone:
        for got, want in zip(script.answers, hand.run(script.steps), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


async def test_interleaved_sequences_over_several_streams(client, hand):
    async def play(number):
        everyone = scripts(range(100 * number + 1, 100 * number + 13), FEATURES, seed=number)
        plan = interleaved(everyone, seed=number)
        by_request = {f"{script.id!r}/{index}": script for script, index in plan}

        async def requests():
            for script, index in plan:
                yield {"model_name": "gru", **script.request(index)}

        async for result, error in client.stream_infer(requests()):
            assert error is None
            assert parameters(result) == {"triton_final_response": True}
            script = by_request[result.get_response().id]
            assert result.get_response().id == f"{script.id!r}/{len(script.answers)}"
            script.answers.append(answer(result))
        return everyone

    for everyone in await asyncio.gather(*map(play, range(1, 5))):
        for script in everyone:
            for got, want in zip(script.answers, hand.run(script.steps), strict=True):
                np.testing.assert_array_equal(got, want, strict=True)


async def test_a_call_that_is_cancelled_before_it_ran_has_moved_nothing(client, hand):
    ahead = asyncio.create_task(client.infer("gru", given(LONG), sequence_id=1, sequence_start=True))
    await arrived(client, 1)
    behind = asyncio.create_task(client.infer("gru", given(X[:1]), sequence_id=1))
    await arrived(client, 2)
    behind.cancel()
    with pytest.raises(asyncio.CancelledError):
        await behind
    assert not ahead.done()
    first = await ahead
    second = await client.infer("gru", given(X[1:2]), sequence_id=1)
    long, short = hand.run([LONG, X[1:2]])
    np.testing.assert_array_equal(answer(first), long, strict=True)
    np.testing.assert_array_equal(answer(second), short, strict=True)


async def test_a_call_that_is_cancelled_with_another_behind_it_runs_so_that_the_order_holds(client, hand):
    ahead = asyncio.create_task(client.infer("gru", given(LONG), sequence_id=1, sequence_start=True))
    await arrived(client, 1)
    middle = asyncio.create_task(client.infer("gru", given(X[:1]), sequence_id=1))
    await arrived(client, 2)
    last = asyncio.create_task(client.infer("gru", given(X[1:2]), sequence_id=1))
    await arrived(client, 3)
    middle.cancel()
    with pytest.raises(asyncio.CancelledError):
        await middle
    assert not ahead.done()
    want = hand.run([LONG, X[:1], X[1:2]])
    np.testing.assert_array_equal(answer(await ahead), want[0], strict=True)
    np.testing.assert_array_equal(answer(await last), want[2], strict=True)


async def test_a_stream_that_is_cancelled_leaves_its_sequences_alive(client, hand):
    sent = asyncio.Event()

    async def requests():
        for index in range(3):
            x = given(X[index : index + 1])
            yield {"model_name": "gru", "inputs": x, "sequence_id": 2, "sequence_start": index == 0}
        await sent.wait()

    call = client.stream_infer(requests())
    want = hand.run([X[index : index + 1] for index in range(4)])
    for index in range(3):
        result, error = await anext(call)
        assert error is None
        np.testing.assert_array_equal(answer(result), want[index], strict=True)
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(call)
    sent.set()
    on = await client.infer("gru", given(X[3:4]), sequence_id=2, sequence_end=True)
    np.testing.assert_array_equal(answer(on), want[3], strict=True)


async def test_a_stream_that_is_cut_is_told_and_its_sequence_goes_on_over_another_connection(
    start_server, transport, make_cutter, hand
):
    server = start_server()
    answered = asyncio.Event()

    async def requests():
        x = given(X[:1])
        yield {"model_name": "gru", "inputs": x, "sequence_id": 3, "sequence_start": True}
        await answered.wait()

    want = hand.run([X[:1], X[1:2]])
    async with (
        make_cutter(server.port).serving() as cutter,
        grpcclient.InferenceServerClient(cutter.target) as client,
    ):
        call = client.stream_infer(requests())
        result, error = await anext(call)
        assert error is None
        np.testing.assert_array_equal(answer(result), want[0], strict=True)
        cutter.cut_all()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await anext(call)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        answered.set()
    async with grpcclient.InferenceServerClient(server.target) as client:
        on = await client.infer("gru", given(X[1:2]), sequence_id=3, sequence_end=True)
        np.testing.assert_array_equal(answer(on), want[1], strict=True)


async def test_a_deadline_that_passes_ends_the_call_and_not_the_sequence(start_server, transport, hand):
    server = start_server(*SLOW)
    async with grpcclient.InferenceServerClient(server.target) as client, conveyor.aio.connect(server.target) as sdk:
        ahead = asyncio.create_task(client.infer("gru", given(LONG), sequence_id=1, sequence_start=True))
        await arrived(client, 1)
        with pytest.raises(grpcclient.InferenceServerException) as late:
            await client.infer("gru", given(X[:1]), sequence_id=1, client_timeout=0.05)
        assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert not ahead.done()
        await ahead
        last = await client.infer("gru", given(X[1:2]), sequence_id=1)
        np.testing.assert_array_equal(answer(last), hand.run([LONG, X[1:2]])[1], strict=True)
        async with contextlib.aclosing(sdk.sessions("gru")) as listed:
            assert [(info.id, info.applied_seq) async for info in listed] == [("gru:1", 2)]
