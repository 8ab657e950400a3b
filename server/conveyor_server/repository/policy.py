"""How large a model's runs may be: chosen by what its runs took when it was loaded. Pure.

Invariant: what was given is taken as it is, within what the model can run at all, and everything else follows from it
and the measured times; the same times always give the same policy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.run_times import at_most_s

# The most that is ever chosen, so that a slab can be made before its model is measured.
MAX_BATCH = 256
MAX_QUANTUM = 64
MAX_BATCH_TIME_STEPS = 1024
# A thread of its own costs a run 13 to 60 us for two hand-overs, 3 % of this; and for so long other streams may wait.
INLINE_RUN_S = 0.004

# What a run costs the server besides the model: forming the batch, committing its rows, a message to each stream.
_RUN_COSTS_S = 100e-6
# A batch is large enough when a row costs at most so much more than in the best one: measurements repeat no better.
_ABOUT = 1.03
_LONG_RUN_S = 0.005
# A chunk's run that is shorter holds nobody back: a round trip over the wire takes longer.
_SHORT_RUN_S = 0.0005


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the settings give instead of what would be chosen; None: choose.

    Attributes:
        max_batch: rows of one run.
        quantum: time steps of one row in one run.
        max_batch_time_steps: rows times padded time steps of one run.
        inline_run_s: a run expected to take at most this long runs on the core thread.
    """

    max_batch: int | None = None
    quantum: int | None = None
    max_batch_time_steps: int | None = None
    inline_run_s: float | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a model can run at all, whatever was given and measured; None: any number.

    Attributes:
        rows: of one run.
        time_steps: of one row in one run.
    """

    rows: int | None = None
    time_steps: int | None = None

    @classmethod
    def of(cls, spec: spec_pb2.ModelSpec) -> "Bounds":
        """Those that a model's description says."""
        return cls(spec.max_rows or None, spec.max_time_steps_per_run or None)


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Bounds of one model's runs.

    Attributes:
        max_batch: rows of one run.
        quantum: time steps of one row in one run; longer steps take several.
        max_batch_time_steps: rows times padded time steps of one run.
        inline_run_s: a run expected to take at most this long runs on the core thread, a longer one on the engine's.
        inline_rows: rows of a run of one time step that are expected to run on the core thread; 0: not even one.
        given: names of those fields that the settings gave; the others were chosen, or are bound.
        bound: names of those fields that are as large as the model lets them be.
    """

    max_batch: int
    quantum: int
    max_batch_time_steps: int
    inline_run_s: float
    inline_rows: int
    given: frozenset[str] = frozenset()
    bound: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """One clause, for the log."""
        said = {name: str(getattr(self, name)) for name in ("max_batch", "quantum", "max_batch_time_steps")}
        said["inline_run_s"] = (
            f"{self.inline_run_s:g} ({f'up to {self.inline_rows}' if self.inline_rows else 'no'} sessions)"
        )
        return ", ".join(f"{name} {value}{self._why(name)}" for name, value in said.items())

    def _why(self, name: str) -> str:
        if name in self.bound:
            return " (the model's most)"
        return " given" if name in self.given else ""

    def allows(self, rows: int, time_steps: int) -> bool:
        """True for a run that the scheduler may form; a single row may always have its quantum."""
        within = rows == 1 or rows * time_steps <= self.max_batch_time_steps
        return rows <= self.max_batch and time_steps <= self.quantum and within


def choose(
    step_s: Mapping[tuple[int, int], float], overrides: Overrides | None = None, bounds: Bounds | None = None
) -> BatchPolicy:
    """The policy for a model whose runs took so long.

    The server never waits for a batch to fill, so a large `max_batch` delays nobody while load is low; it is reached
    only when that many sessions are ready, and then a smaller one would make the last of them wait longer. So batches
    may grow as long as that makes a row cheaper, the server's own cost of a run included: an LSTM of 256 units gains
    nothing in the model beyond 128 rows, but a frame of 256 sessions in one run saves the second run. Of sizes that
    are about as good the smallest is taken, because it answers the first sessions sooner, and a run is to stay under
    5 ms - unless twice the rows take less than half as long again: then holding back would only lengthen the queue.

    A chunk shares the model with sessions that send single time steps, which wait for its run. `quantum` is such that
    one chunk alone takes no longer than a full batch of single time steps (or than 0.5 ms, which nobody notices beside
    a round trip), and `max_batch_time_steps` such that chunks beside each other do not either. It is never less than
    `max_batch`, or single time steps could not fill a batch: then a run of chunks does the work of a full batch in
    fewer rows, and takes up to twice as long.

    Times come from a machine that does other things too, which only ever adds to them: no run is taken to last longer
    than a larger one did, nor than smaller ones in its place would.

    Args:
        step_s: (rows, time steps) -> seconds of one run, the fastest seen; at least that of (1, 1). The largest batch
            of one time step in it bounds the `max_batch` that is chosen.
        overrides: what was given.
        bounds: what the model can run at all; a larger number that was given is brought down to it.
    """
    overrides, bounds = overrides or Overrides(), bounds or Bounds()
    by_rows = {rows: run_s for (rows, steps), run_s in step_s.items() if steps == 1}
    by_steps = {steps: run_s for (rows, steps), run_s in step_s.items() if rows == 1}
    max_batch = _within(overrides.max_batch or _max_batch(by_rows), bounds.rows)
    held_s = max(_at(by_rows, max_batch), _SHORT_RUN_S)
    quantum = _within(overrides.quantum or _largest(by_steps, MAX_QUANTUM, held_s, least=1), bounds.time_steps)
    inline_run_s = INLINE_RUN_S if overrides.inline_run_s is None else overrides.inline_run_s
    given = frozenset(item.name for item in fields(Overrides) if getattr(overrides, item.name) is not None)
    reached = {"max_batch": max_batch == bounds.rows, "quantum": quantum == bounds.time_steps}
    bound = frozenset(name for name, is_most in reached.items() if is_most)
    return BatchPolicy(
        max_batch=max_batch,
        quantum=quantum,
        max_batch_time_steps=overrides.max_batch_time_steps or _time_steps(step_s, max_batch, quantum, held_s),
        inline_run_s=inline_run_s,
        inline_rows=_largest(by_rows, max_batch, inline_run_s, least=0),
        given=given - bound,
        bound=bound,
    )


def _within(size: int, most: int | None) -> int:
    return size if most is None else min(size, most)


def _max_batch(by_rows: Mapping[int, float]) -> int:
    """The smallest of the powers of two that are about as good as the best of those whose run is not too long."""
    cost_s: dict[int, float] = {}
    for rows in _powers(min(max(by_rows), MAX_BATCH)):
        run_s = _at(by_rows, rows)
        if run_s > _LONG_RUN_S and rows > 1 and run_s > 1.5 * _at(by_rows, rows // 2):
            break
        cost_s[rows] = (run_s + _RUN_COSTS_S) / rows
    return min(rows for rows, row_s in cost_s.items() if row_s <= _ABOUT * min(cost_s.values()))


def _time_steps(step_s: Mapping[tuple[int, int], float], max_batch: int, quantum: int, held_s: float) -> int:
    """The largest power of two of time steps whose run, in rows of a quantum each, takes at most `held_s`."""
    padded = _above(quantum)
    time_steps = max(_above(max_batch), padded)
    while 2 * time_steps <= MAX_BATCH_TIME_STEPS and at_most_s(step_s, 2 * time_steps // padded, padded) <= held_s:
        time_steps *= 2
    return time_steps


def _largest(run_s: Mapping[int, float], limit: int, within_s: float, *, least: int) -> int:
    """The largest of the powers of two up to `limit`, and `limit`, whose run is `within_s`; `least` where none is."""
    return max((size for size in (*_powers(limit), limit) if _at(run_s, size) <= within_s), default=least)


def _at(run_s: Mapping[int, float], size: int) -> float:
    """Seconds of a run of a size, from those that were measured: linear between two, in proportion beyond the last."""
    sizes = sorted(run_s)
    smooth = [min(took_s * max(1.0, at / size) for size, took_s in run_s.items()) for at in sizes]
    return float(np.interp(size, sizes, smooth)) * max(1.0, size / sizes[-1])


def _powers(limit: int) -> Iterator[int]:
    """1, 2, 4, up to `limit`."""
    return (1 << exponent for exponent in range(limit.bit_length()))


def _above(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << (size - 1).bit_length()
