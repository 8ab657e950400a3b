"""Sessions and newer versions of their model: they stay, they move between two steps, or they are closed."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from conveyor_proto.v1 import model_pb2, spec_pb2
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper import head
from conveyor_server.servicers.loader import Loader
from flaky_store import FlakyStore


async def load(server, version: str = "2") -> None:
    server.add_model("sum", version)
    await server.loader.load("sum", version)


def migrate(server, **fields: str):
    return server.models.MigrateSessions(model_pb2.MigrateSessionsRequest(name="sum", **fields))


async def version_of(server, session_id: str = "s") -> str:
    return (await server.stub.GetSession(pb.GetSessionRequest(session_id=session_id))).session.version


async def test_sessions_stay_on_their_version(server) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await load(server)
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await version_of(server) == "1"
    assert (await stream.attached(2, "new")).session.version == "2"


async def test_sessions_move_with_their_state_and_their_answers(server) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    await stream.answer(1, 1, 1.0, 2.0)
    assert await stream.answer(1, 2, 4.0) == [17.0]
    await load(server)
    moved = await migrate(server)
    assert (moved.migrated_sessions, moved.to_version) == (1, "2")
    assert await version_of(server) == "2"
    await stream.step(1, 2, 4.0)
    assert (await stream.expect("result")).replayed
    await stream.step(1, 1, 1.0, 2.0)
    assert (await stream.expect("result")).replayed
    assert await stream.answer(1, 3, 1.0) == [18.0]
    await stream.frame([1], [4], [[1.0]])
    await stream.expect("frame")
    await server.loader.unload("sum", "1", force=False)
    assert await stream.answer(1, 5, 1.0) == [20.0]


async def test_a_session_whose_step_runs_moves_when_it_is_done_and_those_behind_it_run_there(server) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    await load(server)
    old = server.driver.repository.find("sum", "1").serving
    server.runners["sum"].gate.set()
    gate = old.runner.gate
    gate.clear()
    old.runner.entered.clear()
    for seq in (1, 2, 3):
        await stream.step(1, seq, 1.0)
    assert await asyncio.to_thread(old.runner.entered.wait, 20)
    moved = await migrate(server)
    assert moved.migrated_sessions == 1
    gate.set()
    assert [(await stream.expect("result")).seq for _ in range(3)] == [1, 2, 3]
    assert await version_of(server) == "2"
    assert sum(old.runner.rows) == 1
    assert await stream.answer(1, 4, 1.0) == [14.0]
    assert old.backlog.steps == 0
    assert old.slots.free == old.slots.capacity


async def test_a_stored_session_goes_on_once_the_store_knows_its_version(
    make_server: Callable, store: FlakyStore
) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await load(server)
    store.gate.clear()
    await migrate(server)
    await stream.step(1, 2, 1.0)
    await asyncio.sleep(0.05)
    assert server.directory.sessions["s"].applied_seq == 1
    store.gate.set()
    assert (await stream.expect("result")).seq == 2
    record = store.inner.load([("s", 0)])[0]
    assert head.decode("s", record.head).version == "2"


async def test_sessions_that_are_asleep_move_when_they_come_in(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.send(flush=pb.FlushSession(handle=1))
    await stream.expect("durable")
    server.directory.passivate(server.directory.sessions["s"])
    server.driver.kick()
    await load(server)
    assert (await migrate(server)).migrated_sessions == 0
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await version_of(server) == "2"
    assert head.decode("s", store.inner.load([("s", 0)])[0].head).version == "2"


@pytest.mark.parametrize(("policy", "version"), [("migrate", "2"), ("pin", "1")])
async def test_the_policy_says_what_a_new_version_does(server, policy: str, version: str) -> None:
    server.loader = Loader(server.driver, server.metrics, on_new_version=policy)
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await load(server)
    assert await version_of(server) == version
    assert await stream.answer(1, 2, 1.0) == [12.0]


async def test_the_policy_can_close_the_sessions_of_older_versions(server) -> None:
    server.loader = Loader(server.driver, server.metrics, on_new_version="close")
    stream = server.stream()
    await stream.attached(1, "s")
    await load(server)
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_SUPERSEDED


async def test_a_version_of_other_states_takes_no_sessions(server, monkeypatch) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    await load(server)
    other = spec_pb2.ModelSpec()
    other.CopyFrom(server.driver.repository.find("sum", "2").serving.runner.spec)
    other.states[0].shape[0] = 2
    monkeypatch.setattr(server.driver.repository.find("sum", "2").serving.runner, "spec", other)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await migrate(server, from_version="1")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "states" in caught.value.details()
    assert (await migrate(server)).migrated_sessions == 0
    assert await stream.answer(1, 1, 1.0) == [11.0]
