"""Steps that travel in frames give, bit for bit, the answers of steps that travel one by one, from the real server."""

import asyncio
import random

import conveyor
import conveyor.aio
import numpy as np
import pytest

KINDS = ("rnn", "lstm", "gru")
X = np.random.default_rng(17).standard_normal((300, 4)).astype(np.float32)
# Chunks of 1 to 20 time steps, so that frames are ragged and some steps take several runs.
CHUNKS = np.split(X, np.cumsum(np.random.default_rng(18).integers(1, 21, 20)))
CHUNKS = [chunk for chunk in CHUNKS if len(chunk)]


@pytest.fixture(scope="module")
def target(nets, tmp_path_factory, transport):
    """One server of each transport for the module: each test has sessions of its own."""
    from tests.e2e.conftest import serving

    with serving(nets.folder, tmp_path_factory.mktemp("server"), "--transport", transport) as server:
        yield server.target


def one_by_one(target, kind, steps):
    with conveyor.connect(target) as client, client.session(kind) as s:
        return [s.step(x) for x in steps]


def same(got, want):
    return len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("in_flight", [2, 7, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_tokens_is_bit_equal_to_one_by_one(target, kind, in_flight):
    with conveyor.connect(target) as client, client.session(kind) as s:
        got = list(s.stream(X, in_flight=in_flight))
        assert s.applied_seq == len(X)
    assert same(got, one_by_one(target, kind, X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_chunks_is_bit_equal_to_one_by_one(target, kind):
    with conveyor.connect(target) as client, client.session(kind) as s:
        got = list(s.stream(CHUNKS))
    assert same(got, one_by_one(target, kind, CHUNKS))


async def test_many_sessions_that_share_frames_do_not_touch_each_other(target):
    """Each session of two models has its own tokens, some pipelined and some one after the other, all on one stream."""

    async def pipelined(client, kind, x):
        async with client.session(kind) as s:
            return [y async for y in s.stream(x)]

    async def in_turn(client, kind, x):
        async with client.session(kind) as s:
            return [await s.step(token) for token in x]

    inputs = [np.roll(X[:60], shift, axis=0) for shift in range(12)]
    async with conveyor.aio.connect(target) as client:
        ways = [(pipelined, "lstm"), (in_turn, "lstm"), (pipelined, "gru"), (in_turn, "gru")]
        jobs = [ways[index % 4][0](client, ways[index % 4][1], x) for index, x in enumerate(inputs)]
        got = await asyncio.gather(*jobs)
    for index, x in enumerate(inputs):
        want = await asyncio.to_thread(one_by_one, target, ways[index % 4][1], x)
        assert same(got[index], want)


async def test_cuts_lose_and_repeat_no_step_of_a_frame(target, make_cutter):
    cutter = make_cutter(int(target.rpartition(":")[2]))
    chance = random.Random(5)
    async with cutter.serving(), conveyor.aio.connect(cutter.target) as client, client.session("lstm") as s:
        got = []
        async for y in s.stream(X):
            got.append(y)
            if chance.random() < 0.05:
                cutter.cut_all()
        assert s.applied_seq == len(X)
    assert cutter.cuts > 3
    assert same(got, await asyncio.to_thread(one_by_one, target, "lstm", X))


def test_a_refused_step_in_a_frame_stops_those_behind_it_alone(target):
    poisoned = [*X[:20], np.full(4, np.nan, np.float32), *X[20:40]]
    with conveyor.connect(target) as client, client.session("gru") as s:
        answers = s.stream(poisoned)
        got = [next(answers) for _ in range(20)]
        with pytest.raises(conveyor.InvalidInput):
            next(answers)
        assert s.applied_seq == 20
        got += s.stream(X[20:40])
    assert same(got, one_by_one(target, "gru", X[:40]))
