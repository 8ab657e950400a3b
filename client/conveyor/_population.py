"""Many sessions stepped together over one stream, as asyncio code sees them; the blocking `Population` drives them.

Invariant: as a session's, for each row; the rows that fail are named, and what the others answered is never lost.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conveyor._core.batch import Batch, prepare_batch, present_batch
from conveyor._core.frame_step import FrameStep
from conveyor._core.member import Leaving
from conveyor._core.population import PopulationCore
from conveyor._core.signature import Outputs
from conveyor._link import Link
from conveyor._pipeline import pipeline
from conveyor.errors import CallTimeout, ClientClosed, ConveyorError, RowsFailed, StepTimeout

if TYPE_CHECKING:
    from conveyor._opener import Opener

OnError = Literal["raise", "yield"]


class AsyncPopulation:
    """`n` sessions of one model, stepped together. Opened by `AsyncClient.population`.

    A step travels as columns, not as `n` messages. Each row is a session with a life of its own: it can fail, expire or
    be taken over alone. Leaving its `async with` closes the sessions, unless `detach_on_exit=True`.
    """

    def __init__(self, opener: "Opener", link: Link, core: PopulationCore, *, detach_on_exit: bool) -> None:
        self._opener = opener
        self._link = link
        self._core = core
        self._signature = core.signature
        self._detach_on_exit = detach_on_exit
        self._every_row = core.every_row

    def __len__(self) -> int:
        """How many rows."""
        return len(self._every_row)

    @property
    def ids(self) -> list[str]:
        """The sessions' ids, in the order of the rows."""
        return [attachment.session_id for attachment in self._core.attachments]

    @property
    def applied_seq(self) -> NDArray[np.int64]:
        """`[n]`: steps in each session's life that were applied and whose answers have come."""
        with self._link:
            return self._core.acked.astype(np.int64)

    @property
    def durable_seq(self) -> NDArray[np.int64]:
        """`[n]`: each row's last step that is in the server's store, as `Session.durable_seq`."""
        with self._link:
            return self._core.durable.astype(np.int64)

    @property
    def row_errors(self) -> dict[int, ConveyorError]:
        """Rows whose sessions are gone, and why. A step of theirs fails; leave them out with `rows=`."""
        with self._link:
            return dict(self._core.row_errors)

    async def step(self, inputs: Any, *, rows: ArrayLike | None = None, timeout_s: float | None = None) -> Outputs:
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
        chosen = self._rows(rows)
        batch = prepare_batch(self._signature, inputs, len(chosen))
        return await self._answer(await self._submit(chosen, batch, timeout_s), timeout_s)

    async def stream(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        rows: ArrayLike | None = None,
        in_flight: int | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outputs, None]:
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
        chosen = self._rows(rows)
        pending: deque[FrameStep] = deque()

        async def send(item: Any) -> FrameStep | None:
            follows = pending[-1] if pending and on_error == "raise" else None
            return await self._submit(chosen, prepare_batch(self._signature, item, len(chosen)), timeout_s, follows)

        outcomes = pipeline(
            self._opener.io.source(items),
            send=send,
            may_send=lambda count: self._may_send(chosen, count, in_flight),
            answer=lambda step: self._outcome(step, timeout_s),
            pending=pending,
        )
        async with aclosing(outcomes):
            async for outcome in outcomes:
                if isinstance(outcome, RowsFailed) and on_error == "raise":
                    outcome.later = [await self._outcome(step, timeout_s) for step in pending]
                    raise outcome
                yield outcome

    async def flush(self, *, timeout_s: float | None = None) -> NDArray[np.int64]:
        """Has the server store every row now, and returns once it has each step that was answered before the call.

        Args:
            timeout_s: as in `Session.flush`.

        Returns:
            `[n]`, `durable_seq`: at least what `applied_seq` was, but for rows that are gone.

        Raises:
            NotDurable: a row is kept in no store (durability `none`).
            CallTimeout, StoreUnavailable, ConnectionLost: as `Session.flush`.
        """
        with self._link:
            ticket = self._core.flush()
        bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
        if not await self._link.wait(ticket, bound_s):
            raise CallTimeout(f"the population was not stored within {bound_s:g} s")
        return ticket.result().astype(np.int64)

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Closes every session on the server once its steps are answered."""
        await self._leave(Leaving.CLOSE, timeout_s)

    async def detach(self, *, timeout_s: float | None = None) -> None:
        """Lets go of the sessions, which live on until they are resumed, closed or idle for too long; see `Session`."""
        await self._leave(Leaving.DETACH, timeout_s)

    async def __aenter__(self) -> Self:
        """The population itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the sessions, or detaches. What ended the block is never hidden by what ends the population."""
        if self._core.error is not None:
            await self._opener.release(self._link)
            return
        try:
            await (self.detach() if self._detach_on_exit else self.close())
        except ConveyorError as second:
            if error is None:
                raise
            error.add_note(f"the population could not be left in order: {second}")

    # ------------------------------------------------------------ helpers

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.intp]:
        if rows is None:
            return self._every_row
        given = np.asarray(rows)
        if given.dtype == np.bool_ and given.shape == self._every_row.shape:
            given = np.flatnonzero(given)
        if given.ndim != 1 or given.dtype.kind not in "iu" or not len(given):
            raise ValueError(f"rows are one or more indices below {len(self)}, or a mask of {len(self)}")
        if given.min() < 0 or given.max() >= len(self):
            raise ValueError(f"rows are indices from 0 to {len(self) - 1}, not {given.min()} to {given.max()}")
        named = np.zeros(len(self), np.bool_)
        named[given] = True
        if int(named.sum()) != len(given):
            raise ValueError("a row takes one step at a time: each may be named once")
        return given.astype(np.intp)

    def _may_send(self, rows: NDArray[np.intp], pending: int, in_flight: int | None) -> bool:
        if in_flight is not None and pending >= max(1, in_flight):
            return False
        with self._link:
            return self._core.error is None and self._core.blocker(rows) is None

    @overload
    async def _submit(self, rows: NDArray[np.intp], batch: Batch, timeout_s: float | None) -> FrameStep: ...

    @overload
    async def _submit(
        self, rows: NDArray[np.intp], batch: Batch, timeout_s: float | None, follows: FrameStep | None
    ) -> FrameStep | None: ...

    async def _submit(
        self, rows: NDArray[np.intp], batch: Batch, timeout_s: float | None, follows: FrameStep | None = None
    ) -> FrameStep | None:
        """Sends a step once it may be sent. None: rows of `follows` failed, and nothing after it may be applied."""
        timeout_ms = 0 if timeout_s is None else max(1, round(timeout_s * 1000))
        while True:
            with self._link:
                if follows is not None and (follows.errors or follows.ticket.failed):
                    return None
                blocker, full = self._core.blocker(rows), self._core.full
                if blocker is None:
                    return self._core.submit(rows, batch, timeout_ms)
            bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
            if not await self._link.wait(blocker, bound_s):
                what = "not in the server's store, and no more can be kept here" if full else "unanswered"
                raise StepTimeout(f"{bound_s:g} s have passed and earlier steps are {what}: nothing was sent")

    async def _answer(self, step: FrameStep, timeout_s: float | None) -> Outputs:
        outcome = await self._outcome(step, timeout_s)
        if isinstance(outcome, RowsFailed):
            raise outcome
        return outcome

    async def _outcome(self, step: FrameStep, timeout_s: float | None) -> Outputs:
        """The answers, or RowsFailed."""
        # To wait on the server, and then to run and to travel.
        default_s = self._opener.settings.timeout_s
        bound_s = default_s + (default_s if timeout_s is None else timeout_s)
        if not step.ticket.done and not await self._link.wait(step.ticket, bound_s, self._core):
            text = f"no answer for {bound_s:g} s from {step.left} rows: resume them to learn where they are"
            self._end(CallTimeout(text))
        step.ticket.result()
        outputs = present_batch(self._signature, step.batch, step.pieces)
        if not step.errors:
            return outputs
        succeeded = np.ones(len(step.rows), np.bool_)
        succeeded[list(step.errors)] = False
        errors = {int(step.rows[position]): step.errors[position] for position in sorted(step.errors)}
        return RowsFailed(errors, step.rows.copy(), outputs, succeeded)

    def _end(self, error: ConveyorError) -> None:
        with self._link as stream:
            self._core.end(error)
            stream.forget_if_gone(self._core)

    async def _leave(self, how: Leaving, timeout_s: float | None) -> None:
        with self._link as stream:
            left = self._core.leave(how)
            stream.forget_if_gone(self._core)
        bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
        if not await self._link.wait(left, bound_s):
            self._end(CallTimeout(f"no answer for {bound_s:g} s: the sessions live until their idle limit"))
        await self._opener.release(self._link)
        try:
            left.result()
        except ClientClosed:
            return
