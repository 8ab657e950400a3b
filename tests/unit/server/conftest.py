"""A model in numpy, an engine and sessions on it, and a folder that looks like a repository."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.runner.base import Run, RunResult
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.transport.completion_loop import CompletionLoop
from staged import Staged

LOOPS = {"aio": asyncio.new_event_loop, "cq": CompletionLoop}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A whole server runs on the loop of each transport; what else is here needs no transport."""
    return LOOPS if item.path.name in {"test_app.py", "test_telemetry.py"} else {"aio": LOOPS["aio"]}


def last_spec(digest: str = "d1") -> spec_pb2.ModelSpec:
    """`y` is `x`; the states are the last `x` and how many there were."""
    spec = spec_pb2.ModelSpec(spec_version=1, name="last", digest=digest, state_bytes=16)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
    spec.outputs.add(name="y", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
    for name, dtype, shape in (("last", tensor_pb2.DATA_TYPE_FLOAT32, [2]), ("count", tensor_pb2.DATA_TYPE_INT64, [])):
        spec.states.add(name=name, input_name=name, output_name=f"new_{name}", dtype=dtype, shape=shape)
    return spec


class LastRunner(Staged):
    """Remembers the last input and how many there were. `gate` holds runs while it is clear."""

    def __init__(self, capacity: int, digest: str = "d1") -> None:
        self.spec = last_spec(digest)
        self.device = "cpu"
        self.capacity = capacity
        self.last = np.zeros((capacity, 2), np.float32)
        self.count = np.zeros(capacity, np.int64)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False

    def step(self, run: Run) -> RunResult:
        self.entered.set()
        assert self.gate.wait(20)
        x = run.inputs[0]
        self.last[run.destinations] = x[np.arange(len(x)), run.lengths - 1]
        old = np.where(run.fresh, 0, self.count[run.sources])
        self.count[run.destinations] = old + run.lengths
        return RunResult([x.copy()], np.ones(len(x), np.bool_))

    def read_rows(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.last[list(slots)].copy(), self.count[list(slots)].copy()]

    def write_rows(self, slots: Sequence[int], states: Sequence[np.ndarray]) -> None:
        self.last[list(slots)], self.count[list(slots)] = states

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def runner() -> LastRunner:
    return LastRunner(32)


@pytest.fixture
def make_engine(runner: LastRunner) -> Callable[..., Engine]:
    def make(digest: str = "d1", model: str = "last") -> Engine:
        own = runner if digest == "d1" else LastRunner(32, digest)
        return Engine(own, model=model, version="1", limits=EngineLimits(max_batch=8, quantum=4))

    return make


@pytest.fixture
def directory() -> Directory:
    return Directory(SessionLimits(max_sessions=16))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one version of one model."""
    path = tmp_path / "models" / "last" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.touch()
    return tmp_path / "models"
