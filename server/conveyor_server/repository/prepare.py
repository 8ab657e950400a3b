"""From a file to a runner that has run: open, check by its own vectors, warm, measure, choose its batch policy.

Invariant: what is prepared has run for real; a version that cannot run, or computes something else than it was verified
to compute, is found out before any session is on it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.run_times import at_most_s
from conveyor_server.repository.policy import MAX_BATCH, MAX_QUANTUM, BatchPolicy, Bounds, Overrides, choose
from conveyor_server.repository.vectors import check
from conveyor_server.runner.base import Run, Runner

# What a version runs before it is ready: batches of one time step, chunks of one session, and chunks beside each other.
WARM_ROWS = (1, 8, 32, 128, MAX_BATCH)
WARM_TIME_STEPS = (4, 16, MAX_QUANTUM)
WARM_CHUNKS = (8, 16)
# Each size is measured so often, with the others between: what disturbs one round has passed in the next.
_ROUNDS = 3
_MEASURE_S = 0.008
_MIN_REPEATS, _MAX_REPEATS = 3, 8
# No larger size is run after one that took so long, and in no further round.
_SLOW_S = 0.05


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version that is loaded and warm, and not yet published.

    Attributes:
        name: repository name.
        version: repository version.
        runner: all of its slots are free; what they hold is of no meaning.
        load_s: seconds that loading, warming and measuring took.
        loaded_at: when it was done, seconds since the epoch.
        step_s: (rows, time steps) -> seconds of one run of that size, the fastest seen; (1, 1) is always there.
        policy: how large its runs may be.
        checked: verifier vectors that it was checked by; 0: its file holds none.
    """

    name: str
    version: str
    runner: Runner
    load_s: float
    loaded_at: float
    step_s: Mapping[tuple[int, int], float]
    policy: BatchPolicy
    checked: int = 0

    @property
    def usual_s(self) -> dict[tuple[int, int], float]:
        """What runs of the sizes that the policy allows are expected to take.

        Sizes that are never run say nothing about the queue, and none takes longer than others tell: a measurement
        that was disturbed would send runs to the engine's thread that are short.
        """
        return {size: at_most_s(self.step_s, *size) for size in self.step_s if self.policy.allows(*size)}


def prepare(
    name: str, version: str, path: Path, open_runner: Callable[[Path], Runner], overrides: Overrides | None = None
) -> Prepared:
    """Opens, checks, warms, measures and chooses. Any thread; blocks.

    Args:
        name: repository name.
        version: repository version.
        path: the model's file.
        open_runner: opens it.
        overrides: what is given of the policy; what is not is chosen by measurement. Neither is ever more than the
            model's description allows.

    Raises:
        RunnerUnavailable: the file, the device or the provider.
        RunFailed: the model does not run on zeros, or on its vectors.
        NotAsVerified: its vectors fail.
    """
    began = time.perf_counter()
    overrides = overrides or Overrides()
    runner = open_runner(path)
    with contextlib.ExitStack() as undo:
        undo.callback(runner.close)
        bounds = Bounds.of(runner.spec)
        # First: after the measuring, it made every later run of large batches slower by a sixth.
        checked = check(runner)
        step_s = _measured(runner, overrides, bounds)
        policy = choose(step_s, overrides, bounds)
        undo.pop_all()
    return Prepared(name, version, runner, time.perf_counter() - began, time.time(), step_s, policy, checked)


def _measured(runner: Runner, overrides: Overrides, bounds: Bounds) -> dict[tuple[int, int], float]:
    """Runs growing sizes, no larger than the model will see, until one is slow. Some 0.1 s for a small model."""
    most_rows = min(runner.capacity, overrides.max_batch or MAX_BATCH, bounds.rows or MAX_BATCH, MAX_BATCH)
    most_steps = min(overrides.quantum or MAX_QUANTUM, bounds.time_steps or MAX_QUANTUM, MAX_QUANTUM)
    step_s = {(1, 1): _measure(runner, 1, 1)}
    # Whether rows are cheaper together has to be seen even where one alone is slow.
    slow_s = max(_SLOW_S, 2 * step_s[1, 1])
    for rows in _ladder(WARM_ROWS, most_rows):
        step_s[rows, 1] = _measure(runner, rows, 1)
        if step_s[rows, 1] > slow_s:
            break
    longest_s = step_s[1, 1]
    for steps in _ladder(WARM_TIME_STEPS, most_steps):
        if longest_s > _SLOW_S:
            break
        longest_s = step_s[1, steps] = _measure(runner, 1, steps)
    rows, steps = min(WARM_CHUNKS[0], most_rows), min(WARM_CHUNKS[1], most_steps)
    if (rows, steps) not in step_s and at_most_s(step_s, rows, steps) <= _SLOW_S:
        step_s[rows, steps] = _measure(runner, rows, steps)
    for _ in range(1, _ROUNDS):
        for size, run_s in step_s.items():
            if run_s <= _SLOW_S:
                step_s[size] = min(run_s, _measure(runner, *size))
    return step_s


def _ladder(sizes: Iterable[int], limit: int) -> list[int]:
    """The sizes between 1 and the limit, and the limit."""
    return sorted({size for size in (*sizes, limit) if 1 < size <= limit})


def _measure(runner: Runner, rows: int, steps: int) -> float:
    """Seconds of the fastest of some runs: whatever else the machine does only adds to them."""
    run = _zeros(runner.spec, rows, steps)
    runner.step(run)  # the first run of a size allocates
    fastest, spent, repeats = float("inf"), 0.0, 0
    while repeats < _MAX_REPEATS and spent < (_SLOW_S if repeats < _MIN_REPEATS else _MEASURE_S):
        began = time.perf_counter()
        runner.step(run)
        taken = time.perf_counter() - began
        fastest, spent, repeats = min(fastest, taken), spent + taken, repeats + 1
    return fastest


def _zeros(spec: spec_pb2.ModelSpec, batch: int, steps: int) -> Run:
    """Fresh rows that read zeros and end in the first slots."""
    return Run(
        sources=np.zeros(batch, np.int64),
        destinations=np.arange(batch, dtype=np.int64),
        fresh=np.ones(batch, np.bool_),
        lengths=np.full(batch, steps, np.int32),
        inputs=[
            np.zeros((batch, steps, *item.shape) if item.has_time else (batch, *item.shape), to_numpy_dtype(item.dtype))
            for item in spec.inputs
        ],
    )
