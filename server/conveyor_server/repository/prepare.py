"""From a file to a runner that has run: open, warm, measure.

Invariant: what is prepared has run for real; a version that cannot run is found out before any session is on it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

from conveyor_server.runner.base import Run, Runner

# Batch and time sizes that a version runs before it is ready: one token, a batch of tokens, a chunk.
WARM_SIZES = ((1, 1), (16, 1), (1, 16))
_MEASURE_S = 0.02
_MAX_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version that is loaded and warm, and not yet published.

    Attributes:
        name: repository name.
        version: repository version.
        runner: all of its slots are free; what they hold is of no meaning.
        load_s: seconds that loading, warming and measuring took.
        loaded_at: when it was done, seconds since the epoch.
        step_s: (rows, time steps) -> seconds of one run of that size, the fastest seen.
    """

    name: str
    version: str
    runner: Runner
    load_s: float
    loaded_at: float
    step_s: Mapping[tuple[int, int], float]


def prepare(name: str, version: str, path: Path, open_runner: Callable[[Path], Runner]) -> Prepared:
    """Opens, warms and measures. Any thread; blocks.

    Raises:
        RunnerUnavailable: the file, the device or the provider.
        RunFailed: the model does not run on zeros.
    """
    began = time.perf_counter()
    runner = open_runner(path)
    with contextlib.ExitStack() as undo:
        undo.callback(runner.close)
        step_s = {size: _measure(runner, *size) for size in _sizes(runner.capacity)}
        undo.pop_all()
    return Prepared(name, version, runner, time.perf_counter() - began, time.time(), step_s)


def _sizes(capacity: int) -> Iterator[tuple[int, int]]:
    yield from dict.fromkeys((min(batch, capacity), steps) for batch, steps in WARM_SIZES)


def _measure(runner: Runner, batch: int, steps: int) -> float:
    run = _zeros(runner.spec, batch, steps)
    runner.step(run)  # the first run of a size allocates
    fastest, spent, repeats = float("inf"), 0.0, 0
    while spent < _MEASURE_S and repeats < _MAX_REPEATS:
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
