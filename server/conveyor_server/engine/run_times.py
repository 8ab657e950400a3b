"""How long runs take, by size: what the driver and the queue expect of the next one.

Invariant: sizes are told apart as the scheduler tells lengths apart, by the power of two that holds them, because a
time step costs several times less in a large batch than alone; a size that was never run is never taken for faster
than it can be.
"""

import math
from collections.abc import Mapping

# Times the usual, that one run counts as; and of a size that was never run, times what it should take at most.
_MOST, _MOST_AT_FIRST = 4.0, 16.0


class RunTimes:
    """Moving averages of measured runs. Core thread only.

    Args:
        measured: (rows, time steps of each row) -> seconds of one run, measured while the model was warmed.
    """

    def __init__(self, measured: Mapping[tuple[int, int], float] | None = None) -> None:
        self._run_s: dict[tuple[int, int], float] = {}
        self._time_step_s: dict[tuple[int, int], float] = {}
        self._fastest_s = 0.0
        for (rows, time_steps), run_s in (measured or {}).items():
            self.observe(rows, time_steps, rows * time_steps, run_s)

    @property
    def time_step_s(self) -> float:
        """Seconds for one time step of one session in the size that does it fastest; 0 before the first run.

        A full queue makes batches of that size, so this is what its steps cost.
        """
        return self._fastest_s

    def expected_s(self, rows: int, longest: int) -> float:
        """Seconds of a run of about this size; where none was seen, at most so many; infinity before the first run."""
        size = _size(rows, longest)
        seen = self._run_s.get(size)
        return at_most_s(self._run_s, *size) if seen is None else seen

    def observe(self, rows: int, longest: int, time_steps: int, run_s: float) -> None:
        """Learns from a run of `time_steps` valid time steps in all, `longest` of them in the longest row."""
        size = _size(rows, longest)
        # A process that stood still, or had no CPU, tells nothing of the model: one run counts as several times the
        # usual at most, and if they are all so long, that is soon learnt.
        usual_s = self._run_s.get(size)
        most_s = _MOST_AT_FIRST * at_most_s(self._run_s, *size) if usual_s is None else _MOST * usual_s
        run_s = min(run_s, most_s)
        known_s = run_s if usual_s is None else usual_s
        cost_s = run_s / time_steps
        self._run_s[size] = 0.8 * known_s + 0.2 * run_s
        self._time_step_s[size] = 0.8 * self._time_step_s.get(size, cost_s) + 0.2 * cost_s
        self._fastest_s = min(self._time_step_s.values())


def at_most_s(measured: Mapping[tuple[int, int], float], rows: int, longest: int) -> float:
    """Seconds that a run of this size takes at most, as far as measured runs tell; infinity where there are none.

    A smaller run takes no longer than a larger one, and a run k times the size no longer than k runs: so each measured
    size is a bound for every other, and the lowest of them holds.

    Args:
        measured: (rows, time steps of each row) -> seconds of one run.
        rows: of the run.
        longest: time steps of its longest row.
    """
    return min(
        (run_s * max(1.0, rows / has[0]) * max(1.0, longest / has[1]) for has, run_s in measured.items()),
        default=math.inf,
    )


def _size(rows: int, longest: int) -> tuple[int, int]:
    """The largest size of the class: powers of two."""
    return 1 << (rows - 1).bit_length(), 1 << (longest - 1).bit_length()
