"""What stands before a step that arrives now: the steps that were accepted and not answered, and what they cost.

Invariant: a step counts once, from its acceptance to its answer, and with one quantum at most. A long prompt stands
before others for one quantum: after that, others are served before it goes on.
"""

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.run_times import RunTimes

# Runs of fewer rows say nothing of what a row costs when many wait.
_MANY = 32
# What a row is taken to cost at first, at most; and times what it was taken to cost before.
_MOST_ROW_S, _MOST_TIMES = 1e-3, 4.0


class Backlog:
    """The accepted steps of one engine. Core thread only.

    Args:
        quantum: time steps of one step that count at most.
        max_batch: rows of one run at most.

    Attributes:
        steps: accepted and not answered.
        time_steps: of them, that count.
        row_s: seconds that a step costs the server beside the model's run (its message, its answer, the batch), as
            measured while there was always something to do; 0 before that.
    """

    def __init__(self, quantum: int, max_batch: int) -> None:
        self.steps = 0
        self.time_steps = 0
        self.row_s = 0.0
        self._quantum = quantum
        self._many = min(_MANY, max_batch)
        # Of the last batch: its rows, when it was taken, how long it ran, when it came back.
        self._last = (0, 0.0, 0.0, 0.0)

    def add(self, length: int, steps: int = 1) -> None:
        """Steps of that many time steps each are accepted."""
        self.steps += steps
        self.time_steps += min(length, self._quantum) * steps

    def remove(self, length: int, steps: int = 1) -> None:
        """Steps that were added are answered."""
        self.steps -= steps
        self.time_steps -= min(length, self._quantum) * steps

    def queue_s(self, run_times: RunTimes) -> float:
        """How long all of that takes, in seconds, as far as the past tells."""
        return self.time_steps * run_times.time_step_s + self.steps * self.row_s

    def taken(self, batch: Batch, oldest_at: float) -> None:
        """A batch goes out; the oldest of its steps was accepted at `oldest_at`."""
        rows, taken_at, run_s, delivered_at = self._last
        if rows >= self._many and oldest_at <= delivered_at:
            # It waited for the last one: between the two, nothing was done but what batches take.
            row_s = max(0.0, batch.taken_at - taken_at - run_s) / rows
            # As of RunTimes: a process that stood still tells nothing of a row.
            row_s = min(row_s, _MOST_TIMES * self.row_s if self.row_s else _MOST_ROW_S)
            self.row_s = 0.8 * self.row_s + 0.2 * row_s if self.row_s else row_s

    def delivered(self, batch: Batch, now: float) -> None:
        """A batch came back."""
        self._last = (batch.rows, batch.taken_at, batch.run_s, now)
