"""A population, as blocking code sees it."""

from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conveyor._core.signature import Outputs
from conveyor._io.base import drive, iterate
from conveyor._population import AsyncPopulation, OnError
from conveyor.errors import ConveyorError


class Population:
    """`n` sessions of one model, stepped together. Opened by `Client.population`.

    A step travels as columns, not as `n` messages. Each row is a session with a life of its own: it can fail, expire or
    be taken over alone. Any thread may call. Leaving its `with` closes the sessions, unless `detach_on_exit=True`.
    """

    def __init__(self, population: AsyncPopulation) -> None:
        self._population = population

    def __len__(self) -> int:
        """How many rows."""
        return len(self._population)

    @property
    def ids(self) -> list[str]:
        """The sessions' ids, in the order of the rows."""
        return self._population.ids

    @property
    def applied_seq(self) -> NDArray[np.int64]:
        """`[n]`: steps in each session's life that were applied and whose answers have come."""
        return self._population.applied_seq

    @property
    def durable_seq(self) -> NDArray[np.int64]:
        """`[n]`: each row's last step that is in the server's store, as `Session.durable_seq`."""
        return self._population.durable_seq

    @property
    def row_errors(self) -> dict[int, ConveyorError]:
        """Rows whose sessions are gone, and why. A step of theirs fails; leave them out with `rows=`."""
        return self._population.row_errors

    def step(self, inputs: Any, *, rows: ArrayLike | None = None, timeout_s: float | None = None) -> Outputs:
        """Applies one step to each of some rows.

        Args:
            inputs: for `k` rows, a dict by name where the model has several inputs, of:
                `[k, *shape]`: one time step each;
                `[k, time, *shape]`: chunks of one length;
                a list of `k` arrays `[time, *shape]`: chunks of any lengths;
                a tuple `(data [sum(lengths), *shape], lengths [k])`: the same, packed.
            rows: which rows, each at most once: indices `[k]` or a mask `[n]`; None: all.
            timeout_s: how long each row may wait on the server before it runs; None: the server's setting.

        Returns:
            In the same form: `[k, *shape]`, `[k, time, *shape]`, a list, or `(data, lengths)`; a dict by name where the
            model has several outputs. An output without a time axis is always `[k, *shape]`.

        Raises:
            InvalidInput: not what the model takes. Nothing was sent.
            RowsFailed: some rows failed; it carries which, and the others' outputs.
            StepTimeout: earlier steps were not answered, or not stored, in time. Nothing was sent.
            CallTimeout, ConnectionLost: as `Session.step`; which rows were applied is unknown.
        """
        return drive(self._population.step(inputs, rows=rows, timeout_s=timeout_s))

    def stream(
        self,
        items: Iterable[Any],
        *,
        rows: ArrayLike | None = None,
        in_flight: int | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Generator[Outputs, None, None]:
        """Steps through `items`, several on their way at once, and yields the answers in order.

        Args:
            items: what `step` takes, one after the other. The next one is only pulled when it can be sent at once.
            rows: as in `step`, for all items.
            in_flight: steps that may be unanswered; None: what the server granted.
            on_error: `"raise"` ends at the first RowsFailed, whose `later` has the outcomes of the steps that were
                already on their way; `"yield"` hands RowsFailed out in the place of the answer, and goes on.
            timeout_s: as in `step`, of each.

        Raises:
            RowsFailed: as said.
            ConveyorError: as `step`.
        """
        answers = self._population.stream(items, rows=rows, in_flight=in_flight, on_error=on_error, timeout_s=timeout_s)
        return iterate(answers)

    def flush(self, *, timeout_s: float | None = None) -> NDArray[np.int64]:
        """Has the server store every row now, and returns once it has each step that was answered before the call.

        Args:
            timeout_s: as in `Session.flush`.

        Returns:
            `[n]`, `durable_seq`: at least what `applied_seq` was, but for rows that are gone.

        Raises:
            NotDurable: a row is kept in no store (durability `none`).
            CallTimeout, StoreUnavailable, ConnectionLost: as `Session.flush`.
        """
        return drive(self._population.flush(timeout_s=timeout_s))

    def close(self, *, timeout_s: float | None = None) -> None:
        """Closes every session on the server once its steps are answered."""
        drive(self._population.close(timeout_s=timeout_s))

    def detach(self, *, timeout_s: float | None = None) -> None:
        """Lets go of the sessions, which live on until they are resumed, closed or idle for too long; see `Session`."""
        drive(self._population.detach(timeout_s=timeout_s))

    def __enter__(self) -> Self:
        """The population itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the sessions, or detaches. What ended the block is never hidden by what ends the population."""
        drive(self._population.__aexit__(kind, error, traceback))
