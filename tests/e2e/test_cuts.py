"""Two thousand sessions over twenty streams whose connections are cut at random: nothing is lost, nothing repeated."""

import asyncio
import contextlib
import random

import conveyor.aio
import numpy as np
import pytest

STREAMS, SESSIONS_EACH, STEPS = 20, 100, 12


async def one_client(target, index, nets, progress):
    """A hundred sessions on one stream, each answer compared with the whole sequence's."""
    rng = np.random.default_rng(index)
    inputs = rng.standard_normal((SESSIONS_EACH, STEPS, 4)).astype(np.float32)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(conveyor.aio.connect(target, resume_timeout_s=60))
        sessions = [
            await stack.enter_async_context(client.session("gru", session_id=f"c{index}-{row}"))
            for row in range(SESSIONS_EACH)
        ]

        async def drive(row):
            answers = []
            async for answer in sessions[row].stream(inputs[row]):
                answers.append(answer)
                progress["steps"] += 1
            return np.array(answers)

        answers = await asyncio.gather(*(drive(row) for row in range(SESSIONS_EACH)))
        for row, session in enumerate(sessions):
            assert session.applied_seq == STEPS
            assert answers[row].shape == (STEPS, 3)
            assert np.abs(answers[row] - nets.truth("gru", inputs[row])).max() < 1e-5


@pytest.mark.usefixtures("transport")
async def test_two_thousand_sessions_survive_random_cuts(start_server, nets, make_cutter):
    server = start_server("--max-sessions", "2500")
    progress = {"steps": 0}
    total = STREAMS * SESSIONS_EACH * STEPS
    async with make_cutter(server.port).serving() as cutter:

        async def cut():
            chance = random.Random(11)
            while progress["steps"] < total:
                await asyncio.sleep(chance.uniform(0.2, 0.6))
                cutter.cut_some(chance)

        cutting = asyncio.create_task(cut())
        await asyncio.gather(*(one_client(cutter.target, index, nets, progress) for index in range(STREAMS)))
        cutting.cancel()
        assert cutter.cuts >= 10, "the connections were never cut"
    assert progress["steps"] == total
    status, metrics = server.get("/metrics")
    assert status == 200
    applied = [line for line in metrics.splitlines() if line.startswith("conveyor_steps_total{")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in applied) == total, "a step was applied twice or never"
