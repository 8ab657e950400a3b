"""What is known of the rows of a population: the model, how far each is answered and stored, and who is gone."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from conveyor._core.frame import Seqs
from conveyor._core.frames import Frames
from conveyor._core.signature import Signature
from conveyor.errors import ConveyorError


class Rows:
    """Under its link's lock; see PopulationCore, which is one.

    Args:
        frames: the rows' steps.
    """

    def __init__(self, frames: Frames) -> None:
        self._signature: Signature | None = None
        self._frames = frames
        self._ledger = frames.ledger

    def use(self, signature: Signature) -> None:
        """Sets the model's signature, before the first `submit`."""
        self._signature = signature

    @property
    def signature(self) -> Signature:
        """The model's, once `use` has set it."""
        if self._signature is None:
            raise RuntimeError("the population's model is not known yet")
        return self._signature

    @property
    def every_row(self) -> NDArray[np.intp]:
        """`[n]`, the indices of all rows."""
        return self._frames.every_row

    @property
    def row_errors(self) -> Mapping[int, ConveyorError]:
        """Rows whose sessions are gone -> why."""
        return self._frames.row_errors

    @property
    def acked(self) -> Seqs:
        """`[n]` uint64, the last step of each row that was answered."""
        return self._ledger.acked

    @property
    def durable(self) -> Seqs:
        """`[n]` uint64, the last step of each row that is in the server's store, as far as was heard."""
        return self._ledger.durable

    @property
    def full(self) -> bool:
        """The store lacks so much that nothing more may be submitted."""
        return self._frames.full
