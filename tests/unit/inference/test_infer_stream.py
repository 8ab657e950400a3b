"""ModelStreamInfer: many sequences on one stream and on many, errors, ends, and a server that stops."""

import asyncio
import random

import grpc
import pytest

from tests.unit.inference.conftest import request, until
from tests.unit.transport.test_intake import FIRST


async def test_sequences_that_share_a_stream_are_run_together(client, server) -> None:
    stream = client.stream()
    for turn in range(3):
        server.runner.gate.clear()
        await stream.send(1.0, sequence=100, start=turn == 0)
        await server.run_entered()
        for sequence in range(1, 21):
            await stream.send(float(sequence), sequence=sequence, start=turn == 0, id=str(sequence))
        await until(lambda: server.engine.ready >= 20)
        server.runner.entered.clear()
        server.runner.gate.set()
        answers = dict([await stream.answer() for _ in range(21)])
        assert answers == {"": [FIRST + turn + 1], **{str(n): [FIRST + n * (turn + 1)] for n in range(1, 21)}}
    assert server.runner.rows == [1, 20] * 3
    await stream.end()
    assert len(server.directory.sessions) == 21, "the end of a stream ends no sequence"


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_interleaved_every_sequence_gets_its_own_answers_in_order(client, server, seed) -> None:
    """Over three streams and by calls; a sequence keeps to one of them. Begins, ends, errors and restarts anywhere."""
    choose = random.Random(seed)
    streams = [client.stream() for _ in range(3)]
    expected: list[dict[str, list[object]]] = [{} for _ in streams]
    alive: dict[str, float] = {}
    for number in range(300):
        name = f"s{choose.randrange(12)}"
        home = int(name[1:]) % 3
        kind = choose.random()
        start = name not in alive if kind < 0.9 else choose.random() < 0.5
        end = choose.random() < 0.15
        values = [choose.choice([0.5, 1.0, 2.0]) for _ in range(choose.choice([1, 1, 3]))]
        bad = choose.random() < 0.05
        shape = (1, len(values), 2) if bad else None
        await streams[home].send(*values, sequence=name, start=start, end=end, id=f"{name}-{number}", shape=shape)
        told: object = "refused"
        if not bad and (start or name in alive):
            total = FIRST if start else alive[name]
            told = []
            for value in values:
                total += value
                told.append(total)
            alive[name] = total
            if end:
                del alive[name]
        expected[home].setdefault(name, []).append((f"{name}-{number}", told))
    for stream, wanted in zip(streams, expected, strict=True):
        got: dict[str, list[object]] = {}
        for _ in range(sum(map(len, wanted.values()))):
            identifier, told = await stream.answer()
            name = identifier.split("-")[0]
            got.setdefault(name, []).append((identifier, "refused" if isinstance(told, str) else told))
        assert got == wanted
        await stream.end()
    assert set(server.directory.sessions) == {f"sum:s:{name}" for name in alive}
    for name, total in alive.items():
        session = server.directory.sessions[f"sum:s:{name}"]
        assert session.engine.read(session.lane)[0].tolist() == [total]


async def test_an_error_belongs_to_its_request_and_the_stream_lives_on(client, server) -> None:
    stream = client.stream()
    await stream.send(1.0, sequence=5, id="early")
    identifier, text = await stream.answer()
    assert identifier == "early"
    assert "must specify the START flag" in text
    await stream.send(1.0, sequence=5, start=True, id="now")
    assert await stream.answer() == ("now", [FIRST + 1])
    assert server.metrics.errors["SEQUENCE_INVALID"] == 1
    await stream.end()


async def test_a_client_that_asks_so_has_the_stream_end_with_the_status(client) -> None:
    stream = client.stream(("triton_grpc_error", "true"))
    await stream.send(1.0, sequence=5, start=True, id="good")
    assert await stream.answer() == ("good", [FIRST + 1])
    await stream.send(1.0, sequence=6, id="bad")
    assert "must specify the START flag" in await stream.ended(grpc.StatusCode.INVALID_ARGUMENT)
    # The sequences are where they were.
    assert (await client.infer(1.0, sequence=5)).outputs


async def test_bytes_that_are_no_request_end_the_stream(client, server) -> None:
    call = server.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read(), 20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no ModelInferRequest" in caught.value.details()


async def test_what_was_taken_is_answered_after_the_client_has_sent_its_last(client, server) -> None:
    stream = client.stream()
    server.runner.gate.clear()
    await stream.send(1.0, sequence=5, start=True, id="1")
    await server.run_entered()
    await stream.send(1.0, sequence=5, id="2")
    await stream.call.done_writing()
    server.runner.gate.set()
    assert [await stream.answer(), await stream.answer()] == [("1", [FIRST + 1]), ("2", [FIRST + 2])]
    await stream.ended(grpc.StatusCode.OK)
    await server.no_streams()


async def test_a_stream_that_is_cut_ends_no_sequence_and_what_was_taken_is_run(client, server) -> None:
    stream = client.stream()
    server.runner.gate.clear()
    await stream.send(1.0, sequence=5, start=True)
    await server.run_entered()
    await stream.send(1.0, sequence=5)
    await until(lambda: server.directory.sessions["sum:5"].accepted_seq >= 2)
    stream.call.cancel()
    await server.no_streams()
    server.runner.gate.set()
    assert (await client.infer(1.0, sequence=5, end=True)).outputs
    assert server.directory.opened == 1


async def test_a_server_that_stops_answers_what_it_has_and_says_so(client, server) -> None:
    stream, idle = client.stream(), client.stream()
    await idle.send(1.0, sequence=6, start=True)
    await idle.answer()
    server.runner.gate.clear()
    server.runner.entered.clear()
    await stream.send(1.0, sequence=5, start=True, id="1")
    await server.run_entered()
    server.directory.draining = True
    now = server.driver.now()
    drained = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    assert "Server is stopping" in await idle.ended(grpc.StatusCode.UNAVAILABLE)
    code, text = await client.refused(request(1.0, sequence=6))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "Server is stopping" in text
    assert not drained.done()
    server.runner.gate.set()
    assert await stream.answer() == ("1", [FIRST + 1])
    assert "Server is stopping" in await stream.ended(grpc.StatusCode.UNAVAILABLE)
    assert await drained
