"""Which sizes a version runs before it serves, and what of it is kept, with a runner that takes made-up times."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.repository import Overrides, Prepared
from conveyor_server.repository import prepare as prepare_module
from conveyor_server.runner.base import Run, RunResult
from staged import Staged

TakesS = Callable[[int, int], float]


class TimedRunner(Staged):
    """Its clock is the test's: a run takes `takes_s(rows, time steps)`, the first of a size ten times that."""

    device = "cpu"

    def __init__(self, takes_s: TakesS, capacity: int) -> None:
        self.spec = spec_pb2.ModelSpec(spec_version=1, name="timed")
        self.spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
        self.capacity = capacity
        self.takes_s = takes_s
        self.now = 0.0
        self.runs: Counter[tuple[int, int]] = Counter()

    def step(self, run: Run) -> RunResult:
        rows, steps = run.inputs[0].shape[:2]
        assert rows <= self.capacity
        assert (run.lengths == steps).all()
        assert len(set(run.destinations.tolist())) == rows
        self.runs[rows, steps] += 1
        self.now += self.takes_s(rows, steps) * (10 if self.runs[rows, steps] == 1 else 1)
        return RunResult([], np.ones(rows, np.bool_))

    def close(self) -> None:
        raise AssertionError("closed")


@pytest.fixture
def prepared(monkeypatch) -> Callable[..., tuple[Prepared, TimedRunner]]:
    def make(
        takes_s: TakesS, capacity: int = 1000, *, max_rows: int = 0, max_steps: int = 0, **given
    ) -> tuple[Prepared, TimedRunner]:
        runner = TimedRunner(takes_s, capacity)
        runner.spec.max_rows, runner.spec.max_time_steps_per_run = max_rows, max_steps
        clock = SimpleNamespace(perf_counter=lambda: runner.now, time=lambda: 1e9)
        monkeypatch.setattr(prepare_module, "time", clock)
        made = prepare_module.prepare("timed", "1", Path("none"), lambda path: runner, Overrides(**given))
        return made, runner

    return make


def small(rows: int, steps: int) -> float:
    return (30 + 4 * rows * steps) * 1e-6


ROWS = {(rows, 1) for rows in (1, 8, 32, 128, 256)}
CHUNKS = {(1, 4), (1, 16), (1, 64), (8, 16)}


def test_a_small_model_runs_every_size_in_little_time(prepared):
    made, runner = prepared(small)
    assert made.step_s == pytest.approx({size: small(*size) for size in ROWS | CHUNKS})
    assert made.load_s == runner.now < 0.4
    assert min(runner.runs.values()) >= 10
    assert made.policy == prepare_module.choose(made.step_s)
    assert made.usual_s == {size: run_s for size, run_s in made.step_s.items() if made.policy.allows(*size)}


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        (1, {(1, 1), (1, 4), (1, 16), (1, 64)}),
        (5, {(1, 1), (5, 1), (1, 4), (1, 16), (1, 64), (5, 16)}),
        (8, {(1, 1), (8, 1), *CHUNKS}),
        (40, {(1, 1), (8, 1), (32, 1), (40, 1), *CHUNKS}),
    ],
)
def test_no_run_exceeds_the_slab(prepared, capacity, sizes):
    made, runner = prepared(small, capacity)
    assert set(runner.runs) == set(made.step_s) == sizes
    assert made.policy.max_batch <= capacity


def test_sizes_that_the_settings_exclude_are_not_run(prepared):
    made, runner = prepared(small, max_batch=4, quantum=2)
    assert set(runner.runs) == {(1, 1), (4, 1), (1, 2), (4, 2)}
    assert (made.policy.max_batch, made.policy.quantum, made.policy.given) == (4, 2, {"max_batch", "quantum"})
    assert set(prepared(small, max_batch=1, quantum=1)[1].runs) == {(1, 1)}


def test_sizes_that_the_model_cannot_run_are_not_run(prepared):
    made, runner = prepared(small, max_rows=1, max_steps=1, max_batch=64, quantum=16)
    assert set(runner.runs) == set(made.usual_s) == {(1, 1)}
    assert (made.policy.max_batch, made.policy.quantum) == (1, 1)
    made, runner = prepared(small, max_steps=1)
    assert set(runner.runs) == ROWS
    assert (made.policy.max_batch, made.policy.quantum) == (256, 1)


def test_a_huge_setting_is_not_run(prepared):
    made, runner = prepared(small, max_batch=900, quantum=4000)
    assert set(runner.runs) == ROWS | CHUNKS
    assert (made.policy.max_batch, made.policy.quantum) == (900, 4000)


def test_growing_ends_with_the_first_slow_run(prepared):
    """2 ms a row and time step: 32 rows are slow, and 64 time steps; eight chunks beside each other would be."""
    _, runner = prepared(lambda rows, steps: 2e-3 * rows * steps)
    assert set(runner.runs) == {(1, 1), (8, 1), (32, 1), (1, 4), (1, 16), (1, 64)}
    assert runner.runs[32, 1] == runner.runs[1, 64] == 2, "to warm and to measure, and not again"


def test_a_model_that_is_slow_alone_shows_whether_rows_share_that(prepared):
    linear, runner = prepared(lambda rows, steps: 0.08 * rows * steps)
    assert runner.runs == {(1, 1): 2, (8, 1): 2}
    assert linear.policy.max_batch == 1
    assert linear.usual_s == {(1, 1): pytest.approx(0.08)}, "batches of eight are never formed"
    shared, runner = prepared(lambda rows, steps: (0.08 + rows * 0.001) * steps)
    assert set(runner.runs) == {(rows, 1) for rows in (1, 8, 32, 128)}
    assert shared.policy.max_batch == 128


def test_a_disturbance_passes(prepared):
    """Something else has the machine for the first twenty runs: the later rounds find what runs really take."""
    runs = 0

    def takes_s(rows: int, steps: int) -> float:
        nonlocal runs
        runs += 1
        return small(rows, steps) * (3 if runs < 20 else 1)

    made, _ = prepared(takes_s)
    assert made.step_s == pytest.approx({size: small(*size) for size in ROWS | CHUNKS})


def test_a_disturbance_that_stays_is_not_believed(prepared):
    """256 rows are never seen to run alone: what is expected of them is two runs of 128."""
    made, _ = prepared(lambda rows, steps: small(rows, steps) * (3 if rows == 256 else 1))
    assert made.step_s[256, 1] == pytest.approx(3 * small(256, 1))
    assert made.policy.max_batch == 256
    assert made.usual_s[256, 1] == pytest.approx(2 * small(128, 1))
    assert made.usual_s[1, 1] == pytest.approx(small(1, 1))
