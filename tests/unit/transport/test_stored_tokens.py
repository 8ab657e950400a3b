"""Servers that stop: what their streams are told, and how long the next one waits for what they write."""

import asyncio
import time
from collections.abc import Callable

import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper.token import ResumeToken
from flaky_store import FlakyStore
from stored import policy

# Two servers of the fast transport need two loops.
with_two_servers = pytest.mark.asyncio(loop_factories=["aio"])


@with_two_servers
async def test_an_attach_with_a_token_waits_until_its_giver_has_written(
    make_server: Callable, store: FlakyStore
) -> None:
    lazy = policy(checkpoint_s=100.0)
    one, two = await make_server(store=store, policy=lazy), await make_server(store=store, folder="b")
    first, second = one.stream(), two.stream()
    opened = await first.attached(1, "s")
    assert await first.answer(1, 1, 1.0) == [11.0]
    token = ResumeToken("r1", time.time() + 20.0).text()
    await second.attach(1, "s", mode=pb.AttachSession.MODE_RESUME, resume_token=token, answered_seq=1)
    await asyncio.sleep(0.2)
    assert store.inner.load([("s", 0)])[0].epoch == opened.session.epoch, "nobody is fenced meanwhile"
    await first.end()
    attached = await second.expect("attached")
    assert attached.session.applied_seq == 1
    assert await second.answer(1, 2, 2.0) == [13.0]


@with_two_servers
async def test_an_attach_with_a_token_goes_on_once_its_giver_has_stopped(
    make_server: Callable, store: FlakyStore
) -> None:
    lazy = policy(checkpoint_s=100.0)
    one, two = await make_server(store=store, policy=lazy), await make_server(store=store, folder="b")
    first, second = one.stream(), two.stream()
    await first.attached(1, "s")
    await first.answer(1, 1, 1.0)
    token = ResumeToken("r1", time.time() + 0.1).text()
    attached = await second.attached(1, "s", mode=pb.AttachSession.MODE_RESUME, resume_token=token, answered_seq=1)
    assert attached.session.applied_seq == 0


@pytest.mark.parametrize("token", ["", "no token", "cvr1:x:r1", "cvr1:99999999999:r1"])
async def test_a_token_that_is_none_makes_nobody_wait(make_server: Callable, store: FlakyStore, token: str) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s")
    attached = await server.stream().attached(2, "s", mode=pb.AttachSession.MODE_RESUME, resume_token=token)
    assert attached.resumed


async def test_who_is_sent_away_is_told_a_token_and_let_go_once_the_store_has_all(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store, policy=policy(checkpoint_s=100.0))
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.answer(1, 1, 1.0)
    store.gate.clear()
    server.directory.draining = True
    drained = asyncio.ensure_future(server.grpc.drain(server.driver.now() + 10.0, server.driver.now()))
    token = ResumeToken.read((await stream.expect("go_away")).resume_token)
    assert token is not None
    assert token.replica == "r1"
    assert 5.0 < token.left_s() <= 10.0
    assert store.inner.load([("s", 0)])[0].seq == 0
    store.gate.set()
    detached = await stream.expect("detached")
    assert (detached.applied_seq, store.inner.load([("s", 0)])[0].seq) == (1, 1)
    await stream.end()
    assert await drained
