"""The settlement of single steps: what becomes of one once its row of a run came back.

Invariant: a lane's committed slot changes once, when the whole step has run. Until then the state after the shares that
ran is in a working slot that nobody else reads, and that goes back to the pool with whatever ends the step. A finished
step has its outputs, or the fault for which nothing moved.
"""

from collections.abc import Callable, Sequence

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from numpy.typing import NDArray

from conveyor_server.engine.step import Step
from conveyor_server.runner.base import RunFailed, RunResult
from conveyor_server.slab import SlotPool


class Row:
    """A row of a run that was delivered."""

    __slots__ = ("destination", "index", "result")

    def __init__(self, index: int, destinations: NDArray[np.int64], result: RunResult) -> None:
        self.index = index
        self.destination = int(destinations[index])
        self.result = result


class Settlement:
    """Commits or rolls back an engine's steps one by one. Core thread only.

    Args:
        slots: of the engine's slab.
        timed: of each of ModelSpec.outputs, whether it has time.
        resume: takes a step that has more to run.
    """

    def __init__(self, slots: SlotPool, timed: Sequence[bool], resume: Callable[[Step], None]) -> None:
        self._slots = slots
        self._timed = timed
        self._resume = resume

    def settle(self, step: Step, share: int, row: Row, now: float) -> list[Step]:
        """Commits or rolls back one row, of `share` time steps; the step, if that finished it."""
        if not row.result.finite[row.index]:
            self._slots.release(row.destination)
            return self.fail(step, _NON_FINITE, now)
        step.running = False
        if not self._advance(step, share, row):
            self._resume(step)
            return []
        step.finished_at = now
        return [step]

    def fail(self, step: Step, fault: Fault, now: float) -> list[Step]:
        """Finishes a step with a fault: nothing moved. Returns it."""
        step.running = False
        self.roll_back(step)
        step.fault = fault
        step.finished_at = now
        return [step]

    def roll_back(self, step: Step) -> None:
        """Forgets the shares that ran: the step is as it was when it was submitted."""
        if step.working is not None:
            self._slots.release(step.working)
            step.working = None
        step.done = 0
        step.parts = ()

    def _advance(self, step: Step, share: int, row: Row) -> bool:
        """Moves a step over its share; True when that was all of it and its state is committed."""
        # Copies: a row's answer may be kept for replay, and must not keep the whole batch's outputs alive.
        part = [
            array[row.index, :share].copy() if has_time else array[row.index].copy()
            for array, has_time in zip(row.result.outputs, self._timed, strict=True)
        ]
        step.done += share
        if step.working is not None:
            self._slots.release(step.working)
        if step.remaining:
            step.working = row.destination
            step.parts = (*step.parts, part)
            return False
        step.working = None
        if step.lane.slot is not None:
            self._slots.release(step.lane.slot)
        step.lane.slot = row.destination
        step.outputs = self._joined((*step.parts, part)) if step.parts else part
        step.parts = ()
        return True

    def _joined(self, parts: Sequence[Sequence[Array]]) -> Sequence[Array]:
        """The outputs of a whole step from those of its shares."""
        columns = zip(zip(*parts, strict=True), self._timed, strict=True)
        return [np.concatenate(column) if has_time else column[-1] for column, has_time in columns]


def model_failed(model: str, version: str, failure: RunFailed) -> Fault:
    """A run failed, and this step alone was in it."""
    return Fault(
        e.ERROR_REASON_MODEL_FAILED,
        f"model {model} version {version} failed on this step: {failure}; nothing moved, and the session goes on: send "
        "the step again, with other input if it fails again",
        {"model": model, "version": version},
    )


_NON_FINITE = Fault(
    e.ERROR_REASON_STATE_NON_FINITE,
    "the step would have made the session's state non-finite; nothing moved: send the step again with other input",
)
