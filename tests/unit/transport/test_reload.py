"""A version's file is replaced under traffic: by another that passes all checks, or not at all."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper import head
from conveyor_server.servicers import departures
from conveyor_server.servicers.loader import Loader
from flaky_store import FlakyStore
from refusals import refusal

from tests.unit.transport.conftest import until


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves is looked at often."""
    monkeypatch.setattr(departures, "LOOK_S", 0.005)


async def reload(server, content: str, version: str = "1") -> model_pb2.Model:
    server.put("sum", version, content)
    request = model_pb2.LoadModelRequest(name="sum", version=version, reload=True)
    return (await server.models.LoadModel(request)).model


async def listed(server) -> list[tuple[str, int, int]]:
    """(digest, status, sessions) of what is there of the model."""
    models = (await server.models.ListModels(model_pb2.ListModelsRequest())).models
    return [(model.spec.digest, model.status, model.sessions) for model in models if model.name == "sum"]


async def digest_of(server, session_id: str) -> str:
    return (await server.stub.GetSession(pb.GetSessionRequest(session_id=session_id))).session.model_digest


FORMER, LATER = "digest of sum", "digest of sum, later"
READY, LEAVING = model_pb2.MODEL_STATUS_READY, model_pb2.MODEL_STATUS_LEAVING


async def test_sessions_stay_with_the_former_file_until_they_end(server) -> None:
    stream = server.stream()
    await stream.attached(1, "old")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    former = server.runner
    model = await reload(server, "later")
    assert (model.spec.digest, model.status) == (LATER, READY)
    await stream.attached(2, "new")
    assert await listed(server) == [(LATER, READY, 1), (FORMER, LEAVING, 1)]
    assert [await digest_of(server, name) for name in ("old", "new")] == [FORMER, LATER]
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await stream.answer(2, 1, 1.0) == [11.0]
    figures = server.metrics.models["sum", "1"]
    server.metrics.sample(server.directory)
    assert (figures.ready, figures.sessions, figures.slab_bytes) == (1, 2, 2 * 8 * server.runner.capacity)
    assert not former.closed
    await stream.send(close=pb.CloseAttachedSession(handle=1))
    assert (await stream.expect("detached")).handle == 1
    await until(lambda: former.closed)
    assert await listed(server) == [(LATER, READY, 1)]
    assert figures.ready == 1
    assert await stream.answer(2, 2, 1.0) == [12.0]


async def test_whoever_resumes_a_session_is_told_of_its_own_file(server) -> None:
    stream = server.stream()
    await stream.attached(1, "old")
    await reload(server, "timed")

    async def outputs(digest: str) -> list[str]:
        request = model_pb2.GetModelRequest(name="sum", version="1", digest=digest)
        return [item.name for item in (await server.models.GetModel(request)).model.spec.outputs]

    assert await outputs(FORMER) == ["total", "last"]
    assert await outputs("digest of sum, timed") == ["total"]
    assert await outputs("") == ["total"]
    assert await outputs("of neither") == ["total"]


async def test_sessions_move_where_the_policy_says_so(server) -> None:
    server.loader._succession._policy = "migrate"
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    former = server.runner
    await reload(server, "later")
    assert await digest_of(server, "s") == LATER
    assert await stream.answer(1, 2, 1.0) == [12.0]
    await until(lambda: former.closed)
    # Other outputs: it stays.
    later = server.runner
    await reload(server, "timed")
    assert await digest_of(server, "s") == LATER
    assert await stream.answer(1, 3, 1.0) == [13.0]
    assert not later.closed


async def test_sessions_are_closed_where_the_policy_says_so(server) -> None:
    server.loader._succession._policy = "close"
    stream = server.stream()
    await stream.attached(1, "s")
    former = server.runner
    await reload(server, "later")
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_SUPERSEDED
    await until(lambda: former.closed)


async def test_the_same_function_changes_nothing(server) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    former = server.runner
    model = await reload(server, "")
    assert server.runner is not former
    assert server.runner.closed
    assert server.engine.runner is former
    assert (model.spec.digest, model.sessions) == (FORMER, 1)
    assert await stream.answer(1, 1, 1.0) == [11.0]


async def test_a_bad_file_in_its_place_is_told_and_the_former_one_goes_on(server) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    server.put("sum", "1", "broken")
    request = model_pb2.LoadModelRequest(name="sum", version="1", reload=True)
    _, fault = await refusal(server.models.LoadModel(request))
    assert fault.reason == e.ERROR_REASON_MODEL_INVALID
    model = (await server.models.GetModel(model_pb2.GetModelRequest(name="sum"))).model
    assert (model.status, model.latest, model.sessions) == (READY, True, 1)
    assert from_status(model.failure).reason == e.ERROR_REASON_MODEL_INVALID
    figures = server.metrics.models["sum", "1"]
    assert (figures.ready, figures.failed) == (1, 1)
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.attached(2, "t")
    assert await stream.answer(2, 1, 1.0) == [11.0]
    mended = await reload(server, "later")
    assert (mended.spec.digest, mended.HasField("failure"), figures.failed) == (LATER, False, 0)


async def test_others_go_on_while_a_file_is_loaded(server, monkeypatch) -> None:
    """The load is held while it opens its file: the core thread answers as ever, and a second load is refused."""
    stream = server.stream()
    await stream.attached(1, "s")
    held, entered = threading.Event(), threading.Event()
    original = server.driver.repository._open_runner

    def open_runner(path):
        entered.set()
        assert held.wait(20)
        return original(path)

    monkeypatch.setattr(server.driver.repository, "_open_runner", open_runner)
    load = asyncio.create_task(reload(server, "later"))
    assert await asyncio.to_thread(entered.wait, 20)
    for seq in range(1, 6):
        assert await stream.answer(1, seq, 1.0) == [10.0 + seq]
    request = model_pb2.LoadModelRequest(name="sum", version="1", reload=True)
    for call in (
        server.models.LoadModel(request),
        server.models.UnloadModel(model_pb2.UnloadModelRequest(name="sum", version="1", force=True)),
    ):
        assert (await refusal(call))[1].reason == e.ERROR_REASON_MODEL_NOT_READY
    held.set()
    assert (await load).spec.digest == LATER
    assert await stream.answer(1, 6, 1.0) == [16.0]


@pytest.mark.parametrize("policy", ["pin", "migrate"])
async def test_many_swaps_leave_nothing_behind(server, policy: str) -> None:
    server.loader._succession._policy = policy
    stream = server.stream()
    await stream.attached(1, "s")
    engines = []
    for number in range(30):
        engines.append(weakref.ref(server.engine))
        await reload(server, f"number {number}")
        assert await stream.answer(1, number + 1, 1.0) == [11.0 + number]
    kept = 1 if policy == "pin" else 0
    await until(lambda: len(server.driver.repository.leaving()) == kept)
    assert len(server.driver._lanes) == 2 + kept, "of the session's, where it stays, this model and the other one"

    def gone() -> bool:
        gc.collect()
        return sum(ref() is not None for ref in engines) == kept

    await until(gone)


async def test_unload_takes_the_former_file_with_it(server) -> None:
    stream = server.stream()
    await stream.attached(1, "old")
    former = server.runner
    await reload(server, "later")
    await stream.attached(2, "new")
    unload = model_pb2.UnloadModelRequest(name="sum", version="1")
    assert (await refusal(server.models.UnloadModel(unload)))[1].metadata["sessions"] == "2"
    unload.force = True
    assert (await server.models.UnloadModel(unload)).closed_sessions == 2
    assert (former.closed, server.runner.closed) == (True, True)
    assert await listed(server) == []
    assert (await refusal(server.models.UnloadModel(unload)))[1].reason == e.ERROR_REASON_MODEL_NOT_FOUND


async def sleeping(server, stream, store: FlakyStore) -> None:
    """Session `s` in the store alone, held by the stream, after one step."""
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.send(flush=pb.FlushSession(handle=1))
    await stream.expect("durable")
    server.directory.passivate(server.directory.sessions["s"])
    server.driver.kick()


async def test_a_session_that_is_asleep_wakes_with_the_former_file(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    stream = server.stream()
    await sleeping(server, stream, store)
    await reload(server, "later")
    assert [status for _, status, _ in await listed(server)] == [READY, LEAVING]
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await digest_of(server, "s") == FORMER


async def test_a_session_that_is_asleep_moves_when_it_comes_in(make_server: Callable, store: FlakyStore) -> None:
    server = await make_server(store=store)
    server.loader._succession._policy = "migrate"
    stream = server.stream()
    await sleeping(server, stream, store)
    await reload(server, "later")
    assert await stream.answer(1, 2, 1.0) == [12.0]
    assert await digest_of(server, "s") == LATER
    assert head.decode("s", store.inner.load([("s", 0)])[0].head).model_digest == LATER
    # To one of other outputs none moves, though they did before.
    await stream.send(flush=pb.FlushSession(handle=1))
    await stream.expect("durable")
    server.directory.passivate(server.directory.sessions["s"])
    server.driver.kick()
    await reload(server, "timed")
    assert await stream.answer(1, 3, 1.0) == [13.0]
    assert await digest_of(server, "s") == LATER


async def test_the_policy_is_the_loaders(server) -> None:
    loader = Loader(server.driver, server.metrics, on_new_version="close")
    stream = server.stream()
    await stream.attached(1, "s")
    server.put("sum", "1", "later")
    await loader.load("sum", "1", again=True)
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_SUPERSEDED
    loader.stop()
