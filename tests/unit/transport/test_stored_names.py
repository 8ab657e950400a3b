"""Names that are used again: a session that is gone, and whoever has not heard of it, are no bar to the next one."""

import asyncio
from collections.abc import Callable

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from flaky_store import FlakyStore
from refusals import refusal
from stored import ASYNC, NONE, SYNC, durable_seq, options, policy, turn

# Two servers of the fast transport need two loops.
pytestmark = pytest.mark.asyncio(loop_factories=["aio"])
RESUME = pb.AttachSession.MODE_RESUME


async def two_servers(make_server: Callable, store: FlakyStore, **fields: float) -> tuple:
    """The first writes only what it is asked to."""
    one = await make_server(store=store, policy=policy(checkpoint_s=100.0, **fields))
    return one, await make_server(store=store, folder="b", policy=policy("r2"))


@pytest.mark.parametrize("durability", [NONE, ASYNC])
@pytest.mark.parametrize("asleep", [False, True])
async def test_a_name_is_free_once_any_server_has_closed_its_session(
    make_server: Callable, store: FlakyStore, durability: pb.Durability.ValueType, asleep: bool
) -> None:
    one, two = await two_servers(make_server, store, passivate_after_s=0.02 if asleep else 60.0)
    first, other = one.stream(), one.stream()
    await first.attached(1, "s")
    await first.answer(1, 1, 1.0)
    await durable_seq(first, 1)
    # However seldom it is written, it leaves memory in its time.
    async with asyncio.timeout(10):
        while asleep and "s" in one.directory.sessions:
            await turn()
    await two.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
    await other.attached(1, "s", options=options(durability))
    assert (await first.expect("detached")).cause == pb.DETACH_CAUSE_CLOSED
    assert await other.answer(1, 1, 5.0) == [15.0]


async def test_a_name_is_not_free_while_its_session_lives_elsewhere(make_server: Callable, store: FlakyStore) -> None:
    one, two = await two_servers(make_server, store)
    first, second = one.stream(), two.stream()
    await first.attached(1, "s")
    await second.attached(1, "s", mode=RESUME)
    for wanted in (NONE, ASYNC):
        await first.attach(2, "s", options=options(wanted))
        assert (await first.fault())[2].reason == e.ERROR_REASON_SESSION_EXISTS
    assert await second.answer(1, 1, 1.0) == [11.0]


@pytest.mark.parametrize("durability", [ASYNC, SYNC])
async def test_whoever_held_a_session_writes_nothing_into_the_next_of_its_name(
    make_server: Callable, store: FlakyStore, durability: pb.Durability.ValueType
) -> None:
    one, two = await two_servers(make_server, store)
    first, second = one.stream(), two.stream()
    former = await first.attached(1, "s", options=options(durability))
    await two.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
    latter = await second.attached(1, "s", options=options(durability))
    assert latter.session.epoch > former.session.epoch + 1
    await first.step(1, 1, 100.0)
    if durability == ASYNC:
        await first.expect("result")
        await first.send(flush=pb.FlushSession(handle=1))
    assert (await first.expect("detached")).cause == pb.DETACH_CAUSE_TAKEN_OVER
    assert await second.answer(1, 1, 1.0) == [11.0]
    assert await durable_seq(second, 1) == 1
    assert store.inner.load([("s", 0)])[0].seq == 1


async def test_whoever_held_a_session_is_not_let_into_the_next_of_its_name(
    make_server: Callable, store: FlakyStore
) -> None:
    one, two = await two_servers(make_server, store)
    former = await one.stream().attached(1, "s")
    await two.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
    second = two.stream()
    await second.attached(1, "s")
    again = one.stream()
    await again.attach(1, "s", mode=RESUME, max_epoch=former.session.epoch + 3)
    assert (await again.fault())[2].reason == e.ERROR_REASON_SESSION_TAKEN_OVER
    assert await second.answer(1, 1, 1.0) == [11.0]


async def test_a_call_steps_no_session_that_another_server_has_closed(
    make_server: Callable, store: FlakyStore, make_tensor: Callable
) -> None:
    one, two = await two_servers(make_server, store)
    first = one.stream()
    await first.attached(1, "s", options=options(SYNC))
    await two.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
    step = one.stub.Step(pb.StepRequest(session_id="s", seq=1, inputs=[make_tensor(1.0)]))
    assert (await refusal(step))[1].reason == e.ERROR_REASON_SESSION_CLOSED
    assert (await first.expect("detached")).cause == pb.DETACH_CAUSE_CLOSED
