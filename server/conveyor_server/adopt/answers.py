"""What is already known of a file besides the file: said on the command line, or in another server's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from conveyor_server.runner.description import Batch, Constant, Start, Value

_T = TypeVar("_T")


class Refused(Exception):  # noqa: N818 - it says what happened
    """A file that is not adopted. The message says why and what to do."""


class Asked(Refused):
    """A file that cannot be described before questions are answered.

    Args:
        questions: each with the candidates and the flag that answers it.
    """

    def __init__(self, questions: list[str]) -> None:
        count = "one question" if len(questions) == 1 else f"{len(questions)} questions"
        lines = "\n".join(f"  {number}. {question}" for number, question in enumerate(questions, 1))
        super().__init__(f"nothing is guessed, so {count} first:\n{lines}")
        self.questions = questions


@dataclass(frozen=True, slots=True)
class Answers:
    """Names are those of the graph.

    Attributes:
        states: graph input -> the output that is its new value.
        inputs: graph inputs that are no state.
        outputs: graph outputs that clients get; empty: all that are no state.
        stateless: no input is a state.
        batch: what a run takes; None: whatever the graph and the proof allow.
        batch_axes: tensor -> its axis of rows.
        time_axes: graph input -> its axis of time steps.
        shapes: tensor -> one row and time step, without those axes and without the window.
        windows: graph input -> how much a run sees of earlier time steps, and along which axis; None: the only one.
        constants: graph inputs that never change.
        starts: graph inputs that tell a session's first time step.
        initial: graph input -> what it is in a fresh session.
    """

    states: Mapping[str, str] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    outputs: tuple[str, ...] = ()
    stateless: bool = False
    batch: Batch | None = None
    batch_axes: Mapping[str, int] = field(default_factory=dict)
    time_axes: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    starts: Mapping[str, Start] = field(default_factory=dict)
    initial: Mapping[str, Value] = field(default_factory=dict)

    def over(self, others: "Answers") -> "Answers":
        """These, and the others' where these say nothing."""
        return Answers(
            states=_over(self.states, others.states),
            inputs=self.inputs | others.inputs,
            outputs=self.outputs or others.outputs,
            stateless=self.stateless or (others.stateless and not self.states),
            batch=self.batch or others.batch,
            batch_axes=_over(self.batch_axes, others.batch_axes),
            time_axes=_over(self.time_axes, others.time_axes),
            shapes=_over(self.shapes, others.shapes),
            windows=_over(self.windows, others.windows),
            constants=_over(self.constants, others.constants),
            starts=_over(self.starts, others.starts),
            initial=_over(self.initial, others.initial),
        )


def _over(first: Mapping[str, _T], second: Mapping[str, _T]) -> dict[str, _T]:
    return {**second, **first}
