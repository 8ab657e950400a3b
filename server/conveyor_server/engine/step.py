"""A step on its way through an engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault

from conveyor_server.engine.lanes import Lane


@dataclass(slots=True, eq=False)
class Step:
    """One step of one session: applied whole or not at all.

    Attributes:
        lane: the state that it moves. At most one step per lane is in an engine.
        inputs: one for each of ModelSpec.inputs, validated: `[time, *shape]`, or `[*shape]` without time.
        length: time steps, at least 1.
        context: whose step it is; opaque to the engine.
        submitted_at: when it was accepted, in seconds of the driver's clock.
        deadline: when it is too late to begin.
        done: time steps that were run. They count only once all were.
        working: slot of the state after `done` time steps, while 0 < done < length.
        running: part of a batch that is out.
        started_at, finished_at: first batch taken, last batch delivered.
        outputs: when finished, one for each of ModelSpec.outputs: `[time, *shape]`, or `[*shape]` without time.
        fault: when finished, why nothing moved.
        parts: outputs of the shares that were run, while there are more to come.
        train: steps of the session that run as this one, a time step each; see sessions.flight.
    """

    lane: Lane
    inputs: Sequence[Array]
    length: int
    context: Any = None
    submitted_at: float = 0.0
    deadline: float = math.inf
    done: int = 0
    working: int | None = None
    running: bool = False
    started_at: float = 0.0
    finished_at: float = 0.0
    outputs: Sequence[Array] = ()
    fault: Fault | None = None
    parts: Sequence[Sequence[Array]] = ()
    train: int = 1

    @property
    def remaining(self) -> int:
        """Time steps not yet run."""
        return self.length - self.done

    @property
    def begun(self) -> bool:
        """Some but not all time steps were run."""
        return self.working is not None
