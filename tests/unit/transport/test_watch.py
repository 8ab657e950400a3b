"""What changes in the models' folder is taken up, once nobody writes to it any more; nothing good ends for it."""

import asyncio
import errno
import shutil
from pathlib import Path

import pytest
from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.servicers import departures
from conveyor_server.servicers.watch import Watch

from tests.unit.transport.conftest import until

READY, FAILED, LEAVING = model_pb2.MODEL_STATUS_READY, model_pb2.MODEL_STATUS_FAILED, model_pb2.MODEL_STATUS_LEAVING


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves is looked at often."""
    monkeypatch.setattr(departures, "LOOK_S", 0.005)


@pytest.fixture
def watch(server) -> Watch:
    return Watch(server.driver.repository, server.loader, 0.001)


@pytest.fixture
def loads(server, monkeypatch) -> list[str]:
    """Versions that were opened, in order."""
    opened: list[str] = []
    original = server.driver.repository._open_runner

    def open_runner(path):
        opened.append(f"{path.parts[-3]}/{path.parts[-2]}")
        return original(path)

    monkeypatch.setattr(server.driver.repository, "_open_runner", open_runner)
    return opened


async def looks(watch: Watch, times: int = 2) -> None:
    for _ in range(times):
        await watch.look()


def there(server) -> dict[str, int]:
    """Versions of the model with their status."""
    repository = server.driver.repository
    return {
        item.version: item.status for item in (*repository.versions(), *repository.leaving("sum")) if item.name == "sum"
    }


async def test_what_was_there_is_left_alone(watch, loads) -> None:
    await looks(watch, 3)
    assert loads == []


async def test_a_new_version_is_served_after_two_looks_that_are_alike(server, watch, loads) -> None:
    server.add_model("sum", "2")
    server.add_model("third", "7")
    await watch.look()
    assert loads == []
    await looks(watch, 3)
    assert loads == ["sum/2", "third/7"]
    stream = server.stream()
    assert (await stream.attached(1)).session.version == "2"
    assert await stream.answer(1, 1, 1.0) == [11.0]


async def test_a_file_that_grows_is_waited_for(server, watch, loads) -> None:
    for content in ("b", "br", "bro"):
        server.folder.joinpath("sum", "2").mkdir(parents=True, exist_ok=True)
        (server.folder / "sum" / "2" / "model.onnx").write_text(content)
        await watch.look()
    (server.folder / "sum" / "2" / "weights.data").write_text("half")
    await watch.look()
    (server.folder / "sum" / "2" / "weights.data").write_text("all of it")
    await watch.look()
    assert loads == []
    await watch.look()
    assert loads == ["sum/2"]


async def test_unfinished_names_do_not_count(server, watch, loads) -> None:
    server.add_model(".upload", "1")
    server.add_model("fourth.tmp", "1")
    for name in (".model.onnx", "model.onnx.tmp", "model.onnx.part", "model.onnx~"):
        (server.folder / "sum" / "1" / name).write_text("half")
    await looks(watch, 3)
    assert loads == []
    (server.folder / ".upload").rename(server.folder / "fourth")
    await looks(watch)
    assert loads == ["fourth/1"]


async def test_a_changed_file_is_swapped_in_and_only_once(server, watch, loads) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    await watch.look()
    server.put("sum", "1", "later")
    await looks(watch, 4)
    assert loads == ["sum/1"]
    assert server.engine.spec.digest == "digest of sum, later"
    assert await stream.answer(1, 1, 1.0) == [11.0]


async def test_a_bad_file_is_told_once_and_tried_again_when_it_changes(server, watch, loads, caplog) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    server.put("sum", "1", "broken")
    server.put("sum", "2", "broken")
    await looks(watch, 5)
    assert loads == ["sum/1", "sum/2"]
    assert caplog.text.count("the file is broken") == 2
    assert caplog.text.count("sum/1 goes on with its former file") == 1
    assert there(server) == {"1": READY, "2": FAILED}
    assert await stream.answer(1, 1, 1.0) == [11.0]
    server.put("sum", "2", "good")
    await looks(watch)
    assert loads == ["sum/1", "sum/2", "sum/2"]
    assert there(server) == {"1": READY, "2": READY}


async def test_what_is_gone_goes_with_its_last_session(server, watch) -> None:
    stream = server.stream()
    await stream.attached(1, "s", version="1")
    server.add_model("sum", "2")
    await looks(watch)
    runner = server.driver.repository.find("sum", "1").serving.runner
    shutil.rmtree(server.folder / "sum" / "1")
    await watch.look()
    assert there(server) == {"1": READY, "2": READY}, "it may be about to be replaced"
    await watch.look()
    assert there(server) == {"1": LEAVING, "2": READY}
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.attach(2, version="1")
    assert (await stream.fault())[0] == 2
    await stream.send(close=pb.CloseAttachedSession(handle=1))
    await until(lambda: runner.closed)
    assert there(server) == {"2": READY}
    # The name is free again.
    server.add_model("sum", "1")
    await looks(watch)
    assert there(server) == {"1": READY, "2": READY}


async def test_the_last_version_that_is_gone_is_told_of_while_it_has_sessions(server, watch) -> None:
    stream = server.stream()
    await stream.attached(1, "s")
    await watch.look()
    shutil.rmtree(server.folder / "sum")
    await looks(watch)
    models = (await server.models.ListModels(model_pb2.ListModelsRequest())).models
    assert [(model.name, model.status, model.latest, model.sessions) for model in models] == [
        ("other", READY, True, 0),
        ("sum", LEAVING, False, 1),
    ]
    request = model_pb2.GetModelRequest(name="sum", version="1", digest=models[1].spec.digest)
    assert (await server.models.GetModel(request)).model.status == LEAVING
    assert await stream.answer(1, 1, 1.0) == [11.0]
    # And somebody else resumes it.
    other = server.stream()
    await other.attached(1, "s", mode=pb.AttachSession.MODE_RESUME)
    assert await other.answer(1, 2, 1.0) == [12.0]


async def test_sessions_of_what_is_gone_move_where_the_policy_says_so(server, watch) -> None:
    server.loader._succession._policy = "migrate"
    stream = server.stream()
    await stream.attached(1, "s")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    former = server.runner
    # One after the other within two looks: as a folder that is renamed.
    (server.folder / "sum" / "1").rename(server.folder / "sum" / "2")
    await looks(watch)
    await until(lambda: former.closed)
    assert there(server) == {"2": READY}
    assert await stream.answer(1, 2, 1.0) == [12.0]


async def test_sessions_of_what_is_gone_are_closed_where_the_policy_says_so(server, watch) -> None:
    server.loader._succession._policy = "close"
    stream = server.stream()
    await stream.attached(1, "s")
    await watch.look()
    shutil.rmtree(server.folder / "sum")
    await looks(watch)
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_MODEL_UNLOADED
    await until(lambda: not there(server))


async def test_a_bad_version_that_is_gone_has_not_failed(server, watch) -> None:
    server.put("sum", "2", "broken")
    await looks(watch)
    assert there(server) == {"1": READY, "2": FAILED}
    shutil.rmtree(server.folder / "sum" / "2")
    await looks(watch)
    assert there(server) == {"1": READY}
    assert server.metrics.models["sum", "2"].failed == 0


async def test_a_folder_that_is_empty_or_unreadable_ends_nothing(server, watch, caplog) -> None:
    await watch.look()
    away = server.folder.with_name("away")
    server.folder.rename(away)
    await looks(watch, 3)
    server.folder.mkdir()
    await looks(watch, 3)
    assert caplog.text.count("cannot be read") == 1
    assert caplog.text.count("is empty: what is served goes on") == 1
    assert there(server) == {"1": READY}
    server.folder.rmdir()
    away.rename(server.folder)
    await looks(watch, 3)
    assert there(server) == {"1": READY}


async def test_a_file_that_cannot_be_looked_at_is_not_gone(server, watch, monkeypatch) -> None:
    original, why = Path.stat, [OSError(errno.ESTALE, "Stale file handle")]

    def stat(path: Path, **options: bool):
        if "sum" in path.parts and path.name == "model.onnx" and why:
            raise why[0]
        return original(path, **options)

    await watch.look()
    monkeypatch.setattr(Path, "stat", stat)
    await looks(watch, 3)
    assert there(server) == {"1": READY}
    why[0] = FileNotFoundError(errno.ENOENT, "No such file")
    await looks(watch, 1)
    assert there(server) == {"1": LEAVING}


async def test_what_was_unloaded_by_hand_stays_so_until_its_file_changes(server, watch, loads) -> None:
    await watch.look()
    await server.models.UnloadModel(model_pb2.UnloadModelRequest(name="sum", version="1"))
    await looks(watch, 3)
    assert loads == []
    server.put("sum", "1", "later")
    await looks(watch)
    assert loads == ["sum/1"]


async def test_what_was_loaded_by_hand_is_not_loaded_again(server, watch, loads) -> None:
    server.add_model("sum", "2")
    await watch.look()
    await server.models.LoadModel(model_pb2.LoadModelRequest(name="sum"))
    await looks(watch, 3)
    assert loads == ["sum/2"]


async def test_a_description_beside_the_versions_is_part_of_them(server, watch, loads) -> None:
    await watch.look()
    (server.folder / "sum" / "model.yaml").write_text("how the file is to be read")
    await looks(watch, 3)
    assert loads == ["sum/1"]


async def test_it_looks_by_itself_and_survives_what_it_does_not_expect(server, watch, monkeypatch, caplog) -> None:
    original, failures = server.driver.repository.looks, [ValueError("a defect")]

    def fails_once():
        if failures:
            raise failures.pop()
        return original()

    monkeypatch.setattr(server.driver.repository, "looks", fails_once)
    task = asyncio.create_task(watch.run())
    await until(lambda: "the watch of the models' folder failed, and goes on" in caplog.text)
    server.add_model("sum", "2")
    await until(lambda: there(server).get("2") == READY)
    task.cancel()
    await asyncio.wait([task])
