"""Versions come, fail and go without touching each other; a request names only what the folder may hold."""

import threading
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2
from conveyor_server.errors import Refused
from conveyor_server.repository import ModelVersion, Repository
from conveyor_server.repository.folder import is_name, is_version
from conveyor_server.runner.base import Runner

Served = tuple[str, str, Runner]
Add = Callable[..., Path]


def _load(repository: Repository[Served], name: str, version: str) -> ModelVersion[Served]:
    """What the app does, on one thread."""
    assert repository.begin(name, version)
    try:
        return repository.publish(repository.prepare(name, version))
    except Refused as refused:
        repository.fail(name, version, refused.fault)
        return repository.find(name, version)


def _reason(refused: pytest.ExceptionInfo[Refused]) -> str:
    return refused.value.fault.reason_name


def test_a_version_is_loaded_warmed_and_found(repository: Repository[Served], add: Add) -> None:
    add("sum", "1")
    assert repository.begin("sum", "1")
    loading = repository.find("sum")
    assert loading.status == model_pb2.MODEL_STATUS_LOADING
    assert loading.spec is None
    with pytest.raises(Refused) as refused:
        _ = loading.serving
    assert (_reason(refused), refused.value.fault.retry_s) == ("MODEL_NOT_READY", 1.0)
    assert refused.value.fault.metadata == {"model": "sum"}

    prepared = repository.prepare("sum", "1")
    assert set(prepared.step_s) == {(1, 1), (8, 1), (1, 4), (1, 16), (1, 64), (8, 16)}
    assert prepared.policy.max_batch <= 8
    assert all(0 < seconds < 1 for seconds in prepared.step_s.values())
    assert prepared.load_s > sum(prepared.step_s.values())
    assert repository.find("sum").status == model_pb2.MODEL_STATUS_LOADING

    ready = repository.publish(prepared)
    assert ready is repository.find("sum") is repository.find("sum", "1")
    assert ready.status == model_pb2.MODEL_STATUS_READY
    assert ready.serving == ("sum", "1", prepared.runner)
    assert ready.spec is not None
    assert (ready.spec.name, prepared.runner.spec.name) == ("sum", "exported-as")
    assert not repository.begin("sum", "1")


def test_the_latest_is_the_highest_number_that_is_ready(repository: Repository[Served], add: Add) -> None:
    for version in ("9", "10", "11"):
        add("sum", version)
    add("other", "3")
    assert repository.on_disk() == {"other": ["3"], "sum": ["9", "10", "11"]}
    assert repository.newest_on_disk("sum") == "11"
    _load(repository, "sum", "10")
    _load(repository, "sum", "9")
    assert repository.begin("sum", "11")
    assert repository.find("sum").version == "10"
    assert [repository.is_latest(item) for item in repository.versions()] == [False, True, False]
    repository.publish(repository.prepare("sum", "11"))
    assert repository.find("sum").version == "11"
    assert repository.retire("sum", "11").version == "11"
    assert repository.find("sum").version == "10"
    assert [(item.name, item.version) for item in repository.versions()] == [("sum", "9"), ("sum", "10")]


def test_one_bad_file_takes_nothing_down(
    repository: Repository[Served], add: Add, model_proto: onnx.ModelProto
) -> None:
    add("sum", "1")
    path = add("sum", "2", b"no model at all \xff")
    model_proto.graph.node[1].op_type = "NoSuchOperator"
    add("broken", "1", model_proto)
    _load(repository, "sum", "1")
    bad, broken = _load(repository, "sum", "2"), _load(repository, "broken", "1")
    assert repository.find("sum").version == "1"
    assert repository.find("sum").serving
    for item, told in ((bad, "is not an ONNX file"), (broken, "NoSuchOperator")):
        assert item.status == model_pb2.MODEL_STATUS_FAILED
        assert item.failure is not None
        assert item.failure.reason == e.ERROR_REASON_MODEL_INVALID
        assert item.failure.metadata == {"model": item.name, "version": item.version}
        assert told in item.failure.message
        assert str(path.parents[2]) not in item.failure.message
        with pytest.raises(Refused) as refused:
            _ = item.serving
        assert refused.value.fault is item.failure
    assert repository.find("broken") is broken

    path.write_bytes((path.parents[1] / "1" / "model.onnx").read_bytes())
    assert _load(repository, "sum", "2").status == model_pb2.MODEL_STATUS_READY
    assert repository.find("sum").version == "2"


def test_a_model_that_loads_and_does_not_run(
    repository: Repository[Served], add: Add, model_proto: onnx.ModelProto
) -> None:
    model_proto.graph.initializer[0].dims[0] = 0
    model_proto.graph.initializer[0].raw_data = b""
    add("empty-table", "1", model_proto)
    failed = _load(repository, "empty-table", "1")
    assert failed.failure is not None
    assert "it loads, and its first run fails" in failed.failure.message


def test_a_runner_whose_warming_fails_is_closed(models: Path, add: Add) -> None:
    add("sum", "1")
    closed = threading.Event()

    class Broken:
        capacity = 4
        spec = None

        def close(self) -> None:
            closed.set()

    repository = Repository(models, open_runner=lambda path: Broken(), make_engine=lambda prepared: prepared.runner)  # type: ignore[arg-type,return-value]
    with pytest.raises(Refused, match=r"loading it failed unexpectedly \(AttributeError\)") as refused:
        repository.prepare("sum", "1")
    assert _reason(refused) == "MODEL_INVALID"
    assert closed.is_set()


def test_what_is_not_there(repository: Repository[Served], add: Add) -> None:
    add("sum", "1")
    _load(repository, "sum", "1")
    for name, version in (("sum", "2"), ("none", ""), ("none", "1"), ("", "")):
        with pytest.raises(Refused, match="available: sum/1") as refused:
            repository.find(name, version)
        assert _reason(refused) == "MODEL_NOT_FOUND"
        assert refused.value.fault.metadata == {"model": name, "version": version, "available": "sum/1"}
    with pytest.raises(Refused, match=r"no version 2 of model 'sum' is in the model folder .*; available: sum/1"):
        repository.prepare("sum", "2")
    with pytest.raises(Refused, match="no model 'none' is in the model folder as NAME/VERSION/"):
        repository.newest_on_disk("none")
    gone = _load_missing(repository)
    assert gone.value.fault.metadata["version"] == "7"
    with pytest.raises(Refused) as refused:
        repository.retire("sum", "3")
    assert _reason(refused) == "MODEL_NOT_FOUND"


def _load_missing(repository: Repository[Served]) -> pytest.ExceptionInfo[Refused]:
    """A version that is not on disk leaves no trace in the table."""
    assert repository.begin("sum", "7")
    with pytest.raises(Refused) as refused:
        repository.prepare("sum", "7")
    repository.fail("sum", "7", refused.value.fault)
    with pytest.raises(Refused) as again:
        repository.find("sum", "7")
    return again


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("..", "1"),
        (".", "1"),
        ("a/b", "1"),
        ("sum", "../1"),
        ("sum", "01"),
        ("sum", "-1"),
        ("sum", "1\n"),
        ("x" * 129, "1"),
    ],
)
def test_names_that_could_reach_elsewhere(name: str, version: str, repository: Repository[Served], add: Add) -> None:
    add("sum", "1")
    for ask in (repository.prepare, repository.begin):
        with pytest.raises(Refused) as refused:
            ask(name, version)
        assert _reason(refused) == "MODEL_NOT_FOUND"
        assert len(refused.value.fault.message) < 400
    assert repository.versions() == []


def test_while_it_loads(repository: Repository[Served], add: Add) -> None:
    add("sum", "1")
    assert repository.begin("sum", "1")
    for ask in (repository.begin, repository.retire):
        with pytest.raises(Refused) as refused:
            ask("sum", "1")
        assert _reason(refused) == "MODEL_NOT_READY"
    prepared = repository.prepare("sum", "1")
    repository.publish(prepared)
    with pytest.raises(AssertionError, match="sum/1 was not begun"):
        repository.publish(prepared)


def test_what_the_folder_holds_beside_models(repository: Repository[Served], add: Add, models: Path) -> None:
    add("sum", "1")
    add(".hidden", "1")
    add("sum", "draft")
    add("sum", "007")
    (models / "sum" / "5").mkdir()
    (models / "README.md").write_text("notes")
    (models / "with space" / "1").mkdir(parents=True)
    (models / "with space" / "1" / "model.onnx").write_bytes(b"")
    (models / "linked").symlink_to(models / "sum")
    assert repository.on_disk() == {"linked": ["1"], "sum": ["1"]}
    assert (is_name("a.b-c_9"), is_name("..."), is_name("")) == (True, False, False)
    assert (is_version("0"), is_version("1.0"), is_version("٣")) == (True, False, False)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "none", open_runner=_never, make_engine=lambda prepared: prepared.runner)
    with pytest.raises(FileNotFoundError):
        repository.on_disk()


def _never(path: Path) -> Runner:
    raise AssertionError(path)
