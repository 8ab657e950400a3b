"""What the engine asks of a runner.

Invariant: a run reads the rows `sources` and writes the rows `destinations`, and the two never overlap; so whatever
happens in a run, the rows that sessions hold are as they were until the engine commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.v1 import spec_pb2, vectors_pb2
from numpy.typing import NDArray

if TYPE_CHECKING:
    from conveyor_server.compiled import Staging


@dataclass(slots=True)
class Run:
    """One batch for the model; never empty.

    Attributes:
        sources: int64 `[batch]`, slots that hold the rows' state; ignored where fresh.
        destinations: int64 `[batch]`, slots that receive the new state; distinct, and none of them a source.
        fresh: bool `[batch]`, rows that start from the model's initial state.
        lengths: int32 `[batch]`, valid time steps of each row, at least 1; their maximum is time.
        inputs: one for each of ModelSpec.inputs: `[batch, time, *shape]`, or `[batch, *shape]` without time. What lies
            beyond a row's length is finite and influences nothing.
    """

    sources: NDArray[np.int64]
    destinations: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    inputs: Sequence[Array]


@dataclass(slots=True)
class RunResult:
    """What a run gave.

    Attributes:
        outputs: one for each of ModelSpec.outputs: `[batch, time, *shape]`, or `[batch, *shape]` without time. The
            arrays belong to the receiver: no later run overwrites them.
        finite: bool `[batch]`, rows whose new state is finite throughout.
    """

    outputs: Sequence[Array]
    finite: NDArray[np.bool_]


class Runner(Protocol):
    """A loaded step model with its slab. One thread at a time; `step` may be on another thread than the rest.

    While a step runs on the engine thread, the core thread may still read and write rows that are not destinations
    of that step.
    """

    @property
    def spec(self) -> spec_pb2.ModelSpec:
        """The model's description, with the digest."""

    @property
    def vectors(self) -> vectors_pb2.VerifierVectors | None:
        """What the file holds to check it by, of its tensors and within bounds; None: nothing."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the state lives, as found in the running session."""

    @property
    def capacity(self) -> int:
        """Rows of the slab; slots are 0 to capacity - 1."""

    def step(self, run: Run) -> RunResult:
        """Gathers the sources, runs the model, scatters into the destinations.

        Raises:
            RunFailed: the model raised. The destinations hold anything; no other row changed.
        """

    def staging(self, rows: int) -> "Staging | None":
        """The buffers of a run of so many rows of one time step, to be filled in place; None: it takes Runs only.

        They are the runner's, and hold what was put there until the next `step` or `staging`.
        """

    def run_staged(self, staging: "Staging") -> None:
        """`step` for what was filled into these buffers, where the outputs are found until the next one.

        Raises:
            RunFailed: as `step`.
        """

    def read_rows(self, slots: Sequence[int]) -> list[Array]:
        """Copies of the rows: one `[rows, *shape]` array for each of ModelSpec.states."""

    def write_rows(self, slots: Sequence[int], states: Sequence[Array]) -> None:
        """Writes `[rows, *shape]` arrays, one for each of ModelSpec.states, into the slots."""

    def close(self) -> None:
        """Frees the session and the slab. The runner is not used again."""


class RunFailed(Exception):  # noqa: N818 - it says what happened
    """The model's run failed. The message holds no payload."""


class RunnerUnavailable(Exception):  # noqa: N818 - it says what is so
    """A runner could not be made: the file, the device or the provider. The message says what to do."""
