"""Models without state: batches of rows, run together with everyone else's."""

import asyncio
import random

import grpc
import numpy as np
import pytest
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.v1 import session_pb2 as sessions
from conveyor_server.runner.base import RunFailed

from tests.unit.inference.conftest import until

MODEL = "plain"


def batch(x: np.ndarray, **fields: object) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=MODEL, **fields)
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.astype(np.float32).tobytes())
    return message


def outputs(response: pb.ModelInferResponse) -> list[np.ndarray]:
    return [
        np.frombuffer(raw, np.float32).reshape(tuple(output.shape))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]


@pytest.fixture
async def served(server):
    server.add_model(MODEL)
    await server.loader.load(MODEL)
    server.runners[MODEL].forget()
    return server


def rows_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2)).astype(np.float32)


async def test_a_batch_is_answered_row_by_row_in_one_run(client, served) -> None:
    x = rows_of(1, 7)
    for _ in range(2):
        twice, total = outputs(await client.call("ModelInfer", batch(x, id="b")))
        assert np.array_equal(twice, 2 * x)
        assert np.array_equal(total, x.sum(axis=1))
    assert served.runners[MODEL].rows == [7, 7]
    assert served.directory.opened == 7, "sessions of rows are used again"
    assert set(served.directory.sessions) == {f"plain:row:{number}" for number in range(1, 8)}


async def test_rows_of_all_callers_are_run_together(client, served) -> None:
    runner = served.runners[MODEL]
    runner.gate.clear()
    first = asyncio.create_task(client.call("ModelInfer", batch(rows_of(0, 1))))
    assert await asyncio.to_thread(runner.entered.wait, 20)
    stream = client.stream()
    for number in range(4):
        await stream.call.write(batch(rows_of(number, number + 1), id=str(number)))
    calls = [asyncio.create_task(client.call("ModelInfer", batch(rows_of(10 + number, 2)))) for number in range(3)]
    engine = served.driver.repository.find(MODEL).serving
    await until(lambda: engine.ready >= 16)
    runner.gate.set()
    await first
    for number, call in enumerate(calls):
        assert np.array_equal(outputs(await call)[0], 2 * rows_of(10 + number, 2))
    responses = {item.id: item for item in [(await stream.receive()).infer_response for _ in range(4)]}
    for number in range(4):
        assert np.array_equal(outputs(responses[str(number)])[0], 2 * rows_of(number, number + 1))
    assert runner.rows == [1, 16]
    await stream.end()


async def test_what_a_sequence_says_means_nothing_here(client, served) -> None:
    message = batch(rows_of(1, 3))
    message.parameters["sequence_id"].int64_param = 5
    message.parameters["sequence_end"].bool_param = True
    assert len(outputs(await client.call("ModelInfer", message))[1]) == 3


async def test_an_empty_batch_and_a_row_without_one_are_refused(client, served) -> None:
    for shape in ((0, 2), (2,), (1, 1, 2)):
        code, text = await client.refused(batch(np.zeros(shape)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "unexpected shape for input 'x' for model 'plain'. Expected" in text
    assert not served.directory.sessions


async def test_more_rows_than_there_is_room_for_are_refused_whole(make_server, connect_to) -> None:
    server = await make_server(max_sessions=8)
    server.add_model(MODEL)
    await server.loader.load(MODEL)
    client = connect_to(server)
    code, text = await client.refused(batch(rows_of(0, 9)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "no free sequence slot is available" in text
    # What was made for it serves the next ones.
    assert len(outputs(await client.call("ModelInfer", batch(rows_of(0, 8))))[0]) == 8
    assert server.directory.opened == 8


async def test_rows_whose_sessions_have_gone_are_run_on_others(make_server, connect_to) -> None:
    server = await make_server(default_idle_timeout_s=0.05)
    server.add_model(MODEL)
    await server.loader.load(MODEL)
    client = connect_to(server)
    await client.call("ModelInfer", batch(rows_of(0, 3)))
    await until(lambda: not server.directory.sessions)
    assert np.array_equal(outputs(await client.call("ModelInfer", batch(rows_of(2, 3))))[0], 2 * rows_of(2, 3))


async def test_a_caller_that_goes_away_leaves_its_rows_to_others(client, served) -> None:
    runner = served.runners[MODEL]
    runner.gate.clear()
    first = asyncio.create_task(client.call("ModelInfer", batch(rows_of(0, 1))))
    assert await asyncio.to_thread(runner.entered.wait, 20)
    gone = asyncio.create_task(client.call("ModelInfer", batch(rows_of(1, 5))))
    engine = served.driver.repository.find(MODEL).serving
    await until(lambda: engine.ready >= 5)
    gone.cancel()
    await until(lambda: not engine.ready)
    runner.gate.set()
    await first
    await client.call("ModelInfer", batch(rows_of(1, 6)))
    assert runner.rows == [1, 6]
    assert served.directory.opened == 6


async def test_a_model_that_is_unloaded_takes_its_rows_with_it(client, served) -> None:
    await client.call("ModelInfer", batch(rows_of(0, 2)))
    await client.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=MODEL))
    code, text = await client.refused(batch(rows_of(0, 2)))
    assert (code, "unknown model: 'plain'" in text) == (grpc.StatusCode.NOT_FOUND, True)
    await client.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=MODEL))
    assert len(outputs(await client.call("ModelInfer", batch(rows_of(0, 2))))[0]) == 2


@pytest.mark.parametrize("seed", range(4))
async def test_batches_of_all_sizes_get_their_own_rows_back(client, served, seed) -> None:
    """Few rows go one by one and many together; helpers are shared, some are closed by hand, and some callers leave."""
    choose = random.Random(seed)
    for _ in range(12):
        sizes = [choose.choice([1, 2, 3, 4, 5, 9, 30]) for _ in range(6)]
        xs = [rows_of(choose.randrange(1000), size) for size in sizes]
        calls = [asyncio.create_task(client.call("ModelInfer", batch(x))) for x in xs]
        if choose.random() < 0.3:
            gone = calls.pop()
            xs.pop()
            await asyncio.sleep(choose.choice([0.0, 0.002]))
            gone.cancel()
        for x, call in zip(xs, calls, strict=True):
            twice, total = outputs(await call)
            assert np.array_equal(twice, 2 * x)
            assert np.array_equal(total, x.sum(axis=1))
        if served.directory.sessions and choose.random() < 0.5:
            name = choose.choice(sorted(served.directory.sessions))
            await served.stub.CloseSession(sessions.CloseSessionRequest(session_id=name))
    engine = served.driver.repository.find(MODEL).serving
    assert (engine.ready, engine.backlog.time_steps) == (0, 0)
    assert all(not session.pending for session in served.directory.sessions.values())
    assert served.directory.opened < 250


async def test_a_helper_that_somebody_else_takes_is_left_to_him(client, served) -> None:
    await client.call("ModelInfer", batch(rows_of(0, 5)))
    theirs = served.stream()
    await theirs.attached(1, "plain:row:3", mode=sessions.AttachSession.MODE_RESUME, model="")
    assert np.array_equal(outputs(await client.call("ModelInfer", batch(rows_of(1, 5))))[0], 2 * rows_of(1, 5))
    assert served.directory.sessions["plain:row:3"].applied_seq == 1
    assert "plain:row:6" in served.directory.sessions
    await theirs.end()


async def test_a_row_that_fails_fails_its_request_and_no_other(client, served) -> None:
    runner = served.runners[MODEL]
    step, bad = runner.step, np.full((6, 2), runner.POISON, np.float32)

    def poisoned(run):
        if (run.inputs[0] == runner.POISON).any():
            raise RunFailed("poisoned")
        return step(run)

    runner.step = poisoned
    good = [asyncio.create_task(client.call("ModelInfer", batch(rows_of(n, 6)))) for n in range(3)]
    code, text = await client.refused(batch(bad))
    assert (code, "failed on this step" in text) == (grpc.StatusCode.INTERNAL, True)
    for number, call in enumerate(good):
        assert np.array_equal(outputs(await call)[0], 2 * rows_of(number, 6))
    # The helpers of the rows that failed serve the next ones.
    assert np.array_equal(outputs(await client.call("ModelInfer", batch(rows_of(9, 24))))[0], 2 * rows_of(9, 24))
    assert served.directory.opened <= 24


async def test_one_large_batch_does_not_keep_others_from_sessions(make_server, connect_to) -> None:
    server = await make_server(max_sessions=300)
    server.add_model(MODEL)
    await server.loader.load(MODEL)
    client = connect_to(server)
    assert np.array_equal(outputs(await client.call("ModelInfer", batch(rows_of(0, 300))))[0], 2 * rows_of(0, 300))
    await until(lambda: len(server.directory.sessions) == 128)
    # Twice the largest run's are kept.
    assert (await client.infer(1.0, sequence=5, start=True)).outputs
    assert server.directory.closed["closed"] == 172


async def test_more_rows_than_there_can_ever_be_make_nothing(client, served) -> None:
    code, text = await client.refused(batch(np.zeros((100_000, 2))))
    assert (code, "no free sequence slot" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert served.directory.opened == 0


async def test_a_name_that_somebody_took_for_his_session_is_left_out(client, served) -> None:
    await served.stub.CreateSession(sessions.CreateSessionRequest(model="sum", session_id="plain:row:2"))
    assert np.array_equal(outputs(await client.call("ModelInfer", batch(rows_of(0, 3))))[0], 2 * rows_of(0, 3))
    assert {"plain:row:1", "plain:row:3", "plain:row:4"} < set(served.directory.sessions)
