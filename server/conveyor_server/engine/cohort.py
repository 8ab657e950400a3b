"""A cohort: steps of many sessions that are of one length and go through an engine together, as arrays.

Invariants: a cohort is run in one run, or split over runs by rows, never by time; a row that something happens to
(cancelled, failed, asked about) leaves the cohort and goes on as a Step of its own, so that a cohort only ever holds
rows for which all is well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from conveyor_proto.codec import Array
from numpy.typing import NDArray

from conveyor_server.engine.step import Step


class Owner(Protocol):
    """Whose rows they are."""

    def claim(self, member: int, *, running: bool) -> Step:
        """Makes a member's row a Step of its own; the cohort holds it no longer. It is not in the engine yet.

        A row that waits may become a shorter Step, whose owner submits the rest; one that runs becomes a Step as long.
        """


@dataclass(slots=True, eq=False)
class Cohort:
    """Steps beside each other.

    Attributes:
        owner: knows the members by number.
        members: int64 `[rows]`, each row's number with its owner.
        lanes: int64 `[rows]`, the lanes that they move; distinct.
        where: the same, or the slice that they are: of a gateway's sessions, which lie side by side, a slice is looked
            up many times faster.
        inputs: one for each of ModelSpec.inputs, validated: `[rows, time, *shape]`, or `[rows, *shape]` without time.
        length: time steps of each row, at least 1 and at most the quantum.
        submitted_at, deadline: as of a Step.
        train: steps of a session that each row is; see Step.
        running: part of a batch that is out.
        started_at: when that batch was taken.
        outputs: when finished, one for each of ModelSpec.outputs: `[rows, time, *shape]`, or `[rows, *shape]` without
            time. Valid until the engine's next run.
        taken: members that left a cohort that still waits; they are dropped when it is taken.
        claimed: members that left while it runs, as the Steps that they became.
    """

    owner: Owner
    members: NDArray[np.int64]
    lanes: NDArray[np.int64]
    where: "slice | NDArray[np.int64]"
    inputs: Sequence[Array]
    length: int
    submitted_at: float
    deadline: float
    train: int = 1
    running: bool = False
    started_at: float = 0.0
    outputs: Sequence[Array] = ()
    taken: set[int] = field(default_factory=set)
    claimed: dict[int, Step] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that are still its own."""
        return len(self.members) - len(self.taken)

    def compact(self) -> None:
        """Drops the rows that were taken."""
        if self.taken:
            self._keep(~np.isin(self.members, list(self.taken)))
            self.taken.clear()

    def split(self, rows: int) -> "Cohort":
        """Takes the first `rows` rows into a cohort of their own; both are compact."""
        first = Cohort(
            self.owner,
            self.members[:rows],
            self.lanes[:rows],
            self.lanes[:rows],
            [array[:rows] for array in self.inputs],
            self.length,
            self.submitted_at,
            self.deadline,
            self.train,
        )
        self._keep(np.s_[rows:])
        return first

    def _keep(self, chosen: "NDArray[np.bool_] | slice") -> None:
        self.members = self.members[chosen]
        self.lanes = self.where = self.lanes[chosen]
        self.inputs = [array[chosen] for array in self.inputs]
