"""What is told of calls and of steps to whoever traces them: the words alone. Spans are `telemetry`'s.

Invariant: where nobody traces there is no object of this; and whether there is one is asked once a turn, a run or a
call, never once a step.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from google.rpc import status_pb2


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step was where. Seconds of the driver's clock, ascending.

    Attributes:
        accepted_at: it was taken, and began to wait.
        taken_at: its first batch was made.
        ran_from, ran_to: the model ran; of a step that took several runs, the last one.
        done_at: it was recorded, or known to have failed.
        told_at: its answer was with the transport.
    """

    accepted_at: float
    taken_at: float
    ran_from: float
    ran_to: float
    done_at: float
    told_at: float


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step that was chosen to be traced.

    Attributes:
        model, version: what ran it.
        session_id, seq: which step it is.
        time_steps: of it.
        rows: of the batch that it was in; of several, the last one.
        times: when it was where.
        reason: why nothing moved, an ErrorReason without its prefix; "": it was applied.
    """

    model: str
    version: str
    session_id: str
    seq: int
    time_steps: int
    rows: int
    times: StepTimes
    reason: str = ""


class CallTrace(Protocol):
    """A call's place in a trace. One thread at a time.

    Attributes:
        trace_id, span_id: as W3C writes them: 32 and 16 hexadecimal digits.
        recorded: spans are kept; else there is no use in telling it of steps.
    """

    @property
    def trace_id(self) -> str:
        """See above."""

    @property
    def span_id(self) -> str:
        """See above."""

    @property
    def recorded(self) -> bool:
        """See above."""

    def step(self, step: TracedStep) -> None:
        """A step of it was answered."""

    def refused(self, status: status_pb2.Status, count: int = 1) -> None:
        """So many of its steps, or one other thing that it asked for, were refused; the call goes on."""

    def counted(self, sessions: int, steps: int) -> None:
        """So many sessions were attached to it, and so many steps were applied for it, altogether."""

    def end(self, status: status_pb2.Status | None) -> None:
        """The call has ended: with that status, or, None, by its client or with its connection."""


class Tracing(Protocol):
    """Traces calls.

    Attributes:
        steps: chooses the steps that are traced. Core thread only.
    """

    @property
    def steps(self) -> "StepSampler":
        """See above."""

    def begin(self, method: str, metadata: Mapping[str, str]) -> CallTrace:
        """A call has come. Any thread.

        Args:
            method: `package.Service/Method`.
            metadata: what its client sent ahead, by lower-case key: the trace that it is of, perhaps.
        """


OK = status_pb2.Status()
# The call that runs in this context: its ids are in what is logged meanwhile.
_current: ContextVar[CallTrace | None] = ContextVar("call", default=None)


def current() -> CallTrace | None:
    """The call that runs in this context, if it is traced."""
    return _current.get()


def enter(call: CallTrace | None) -> None:
    """What follows in this context is for that call."""
    _current.set(call)


@contextlib.contextmanager
def within(call: CallTrace | None) -> Iterator[None]:
    """What is done in here is for that call."""
    before = _current.set(call)
    try:
        yield
    finally:
        _current.reset(before)


class StepSampler:
    """Chooses one step in `every`, by chance: a fixed distance would meet the same sessions again and again.

    Each distance from one chosen step to the next is between 1 and 2 `every` - 1, all of them alike often.

    Args:
        every: 1: all of them; 0: none.
        distance: draws one, given the longest.
    """

    def __init__(self, every: int, distance: Callable[[int], int] | None = None) -> None:
        self._longest = 2 * every - 1
        self._draw = distance or _drawn
        self._next = self._draw(self._longest) if every else 0

    def take(self, steps: int) -> Sequence[int]:
        """Which of so many steps are chosen, from 0, ascending: nearly always none."""
        left = self._next
        if left > steps or not left:
            if left:
                self._next = left - steps
            return ()
        chosen = []
        while left <= steps:
            chosen.append(left - 1)
            left += self._draw(self._longest)
        self._next = left - steps
        return chosen


def _drawn(longest: int) -> int:
    return random.randint(1, longest)  # noqa: S311 - no secret
