"""A session, as asyncio code sees it. The blocking `Session` drives this very class.

Invariant: an input that was handed to `step` is applied at most once, and its answer is handed out at most once.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Self, overload

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._calls import GET_SESSION, SNAPSHOT_SESSION
from conveyor._core.answer import Answer
from conveyor._core.member import Leaving
from conveyor._core.session import SessionCore
from conveyor._core.signature import Inputs, Outputs, Prepared, Signature
from conveyor._core.step import Step
from conveyor._core.ticket import Ticket
from conveyor._info import Durability, SessionInfo, session_options
from conveyor._link import Link
from conveyor._opening import Opening
from conveyor._pipeline import pipeline
from conveyor.errors import (
    CallTimeout,
    ClientClosed,
    ConnectionLost,
    ConveyorError,
    SessionNotFound,
    SessionTakenOver,
    StepTimeout,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from conveyor._opener import Opener


class AsyncSession:
    """A recurrent model's state on the server, stepped token by token. Opened by `AsyncClient.session`.

    Every method belongs to the client's event loop. Leaving its `async with` closes the session on the server, unless
    it was opened with `detach_on_exit=True`. A broken connection is resumed beneath it; a session that the server has
    lost is reported, and never restarted.
    """

    def __init__(
        self, opener: "Opener", link: Link, core: SessionCore, signature: Signature, *, detach_on_exit: bool
    ) -> None:
        self._opener = opener
        self._link = link
        self._core = core
        self._signature = signature
        self._detach_on_exit = detach_on_exit

    @property
    def id(self) -> str:
        """The session's id: what it takes to resume it from elsewhere."""
        return self._core.attachment.session_id

    @property
    def info(self) -> SessionInfo:
        """What the server said when it was last attached; `refresh` asks again."""
        with self._link:
            return SessionInfo.of(self._core.info)

    @property
    def applied_seq(self) -> int:
        """Steps in the session's life that were applied and whose answers have come."""
        with self._link:
            return self._core.applied_seq

    @property
    def durable_seq(self) -> int:
        """The last step whose state is in the server's store, as far as was heard; 0 where it is kept in none.

        Where answers leave before that (durability `async`) it is behind `applied_seq` for a moment, and the steps
        between are kept here, to be sent again should the server be lost.
        """
        with self._link:
            return self._core.durable_seq

    async def step(self, inputs: Inputs, *, timeout_s: float | None = None) -> Outputs:
        """Applies one time step, or a chunk of them, and returns the model's answer.

        Args:
            inputs: an array where the model has one input, else a dict by name. `[*shape]` is one time step,
                `[time, *shape]` a chunk, applied whole or not at all.
            timeout_s: how long it may wait on the server before it runs; None: the server's setting.

        Returns:
            One array where the model has one output, else a dict by name: `[*shape]` for one time step,
            `[time, *shape]` for a chunk.

        Raises:
            InvalidInput: not what the model takes. Nothing was sent, or nothing moved.
            StepFailed: the server refused it, nothing moved; the session goes on and the input can be sent again.
            StepTimeout: also where `resend_buffer_bytes` of earlier steps are not stored in time. Nothing was sent.
            CallTimeout: no answer although the connection stands; ConnectionLost: no connection for
                `resume_timeout_s`; or StoreUnavailable: no store for as long. Whether it was applied is unknown, and
                this object is of no more use: open the session again with `resume=True` and compare `applied_seq`.
            SessionNotFound, SessionTakenOver: the session is gone, or somebody else's.
            StepGap: the server was lost, and with it steps that cannot be applied again. The message says which.

        Cancelling the task does not take the step back: it is applied, and its answer dropped.
        """
        sent = await self._submit(self._signature.prepare(inputs), timeout_s)
        return await self._answer(sent, timeout_s)

    async def stream(
        self,
        chunks: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        in_flight: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outputs, None]:
        """Steps through `chunks`, several on their way at once, and yields the answers in order.

        Args:
            chunks: what `step` takes, one after the other. The next one is only pulled when it can be sent at once.
            in_flight: steps that may be unanswered; None: what the server granted. A plain iterable that waits for
                the answers itself needs 1.
            timeout_s: as in `step`, of each.

        Raises:
            ConveyorError: as `step`, at the place of the answer. Steps after it were not applied.
        """
        pending: deque[Step] = deque()

        async def send(chunk: Inputs) -> Step | None:
            follows = pending[-1].ticket if pending else None
            return await self._submit(self._signature.prepare(chunk), timeout_s, follows)

        answers = pipeline(
            self._opener.io.source(chunks),
            send=send,
            may_send=lambda pending: self._may_send(pending, in_flight),
            answer=lambda sent: self._answer(sent, timeout_s),
            pending=pending,
        )
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def flush(self, *, timeout_s: float | None = None) -> int:
        """Has the server store the session now, and returns once it has every step that was answered before the call.

        Args:
            timeout_s: how long that may take while there is a connection; None: the client's.

        Returns:
            `durable_seq`: the last step that is stored, at least what `applied_seq` was.

        Raises:
            NotDurable: the session is kept in no store (durability `none`).
            CallTimeout: it took longer. The session goes on, and is stored when it is stored.
            StoreUnavailable: the server's store did not answer for `resume_timeout_s`. The session goes on.
            ConnectionLost: as in `step`.
        """
        with self._link:
            ticket = self._core.flush()
        bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
        if not await self._link.wait(ticket, bound_s):
            raise CallTimeout(f"session {self.id!r} was not stored within {bound_s:g} s")
        return ticket.result()

    async def refresh(self, *, timeout_s: float | None = None) -> SessionInfo:
        """Asks the server for the session's info now. `timeout_s` None: the client's, here and below."""
        request = pb.GetSessionRequest(session_id=self.id)
        answer = await self._opener.call(GET_SESSION, request, session_id=self.id, timeout_s=timeout_s)
        return SessionInfo.of(answer.session)

    async def snapshot(self, *, timeout_s: float | None = None) -> bytes:
        """The session's state at a step boundary, for `client.restore`; steps on their way may be in it or not."""
        request = pb.SnapshotSessionRequest(session_id=self.id)
        answer = await self._opener.call(SNAPSHOT_SESSION, request, session_id=self.id, timeout_s=timeout_s)
        return answer.snapshot

    def fork(
        self,
        *,
        session_id: str | None = None,
        durability: Durability | None = None,
        detach_on_exit: bool = False,
        timeout_s: float | None = None,
    ) -> "Opening[AsyncSession]":
        """A new session with a copy of this one's state and `applied_seq`.

        Args:
            session_id: of the new session; None: chosen.
            durability: as in `client.session`, of the new session.
            detach_on_exit: as in `client.session`.
            timeout_s: as in `client.session`.

        Raises:
            SessionExists: the id is taken.
        """
        fork, options = self._opener.fork, session_options(durability=durability)
        return Opening(lambda: fork(self.id, session_id, options, detach_on_exit=detach_on_exit, timeout_s=timeout_s))

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Closes the session on the server once its steps are answered. Closing what is gone does nothing.

        Raises:
            SessionTakenOver: it lives on with another client.
            ConnectionLost: nobody could be told; it lives until its idle limit.
        """
        if isinstance(self._core.error, (ConnectionLost, CallTimeout, StoreUnavailable)):
            await self._opener.release(self._link)
            await self._opener.close_session(self.id, timeout_s)
            return
        try:
            await self._leave(Leaving.CLOSE, timeout_s)
        except (SessionNotFound, ClientClosed):
            return

    async def detach(self, *, timeout_s: float | None = None) -> None:
        """Lets go of the session, which lives on until it is resumed, closed or idle for too long.

        Returns once the server has stored what was answered, where the session is kept in a store: resumed anywhere, it
        goes on from there.
        """
        try:
            await self._leave(Leaving.DETACH, timeout_s)
        except (SessionTakenOver, ClientClosed):
            return

    async def __aenter__(self) -> Self:
        """The session itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the session, or detaches from it; does nothing to one that was lost, which may have been resumed.

        What ended the block is never hidden by what ends the session.
        """
        if self._core.error is not None:
            await self._opener.release(self._link)
            return
        try:
            await (self.detach() if self._detach_on_exit else self.close())
        except ConveyorError as second:
            if error is None:
                raise
            error.add_note(f"session {self.id!r} could not be left in order: {second}")

    # ------------------------------------------------------------ helpers

    def _may_send(self, pending: int, in_flight: int | None) -> bool:
        if in_flight is not None and pending >= max(1, in_flight):
            return False
        with self._link:
            return self._core.error is None and self._core.blocker() is None

    @overload
    async def _submit(self, prepared: Prepared, timeout_s: float | None) -> Step: ...

    @overload
    async def _submit(
        self, prepared: Prepared, timeout_s: float | None, follows: Ticket[Answer] | None
    ) -> Step | None: ...

    async def _submit(
        self, prepared: Prepared, timeout_s: float | None, follows: Ticket[Answer] | None = None
    ) -> Step | None:
        """Sends a step once it may be sent. None: `follows` has failed, and nothing after it may be applied."""
        timeout_ms = 0 if timeout_s is None else max(1, round(timeout_s * 1000))
        while True:
            with self._link:
                if follows is not None and follows.failed:
                    return None
                blocker, full = self._core.blocker(), self._core.full
                if blocker is None:
                    return self._core.submit(prepared, timeout_ms)
            bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
            if not await self._link.wait(blocker, bound_s):
                what = "not in the server's store, and no more can be kept here" if full else "unanswered"
                raise StepTimeout(f"{bound_s:g} s have passed and earlier steps are {what}: nothing was sent")

    async def _answer(self, sent: Step, timeout_s: float | None) -> Outputs:
        # To wait on the server, and then to run and to travel.
        default_s = self._opener.settings.timeout_s
        bound_s = default_s + (default_s if timeout_s is None else timeout_s)
        if not sent.ticket.done and not await self._link.wait(sent.ticket, bound_s, self._core):
            text = f"no answer for {bound_s:g} s: resume session {self.id!r} to learn whether the step was applied"
            self._end(CallTimeout(text))
        outputs = sent.ticket.result().outputs
        return self._signature.present(outputs, sent.prepared.time_steps, one=sent.prepared.one)

    def _end(self, error: ConveyorError) -> None:
        with self._link as core:
            self._core.end(error)
            core.forget_if_gone(self._core)

    async def _leave(self, how: Leaving, timeout_s: float | None) -> None:
        with self._link as core:
            left = self._core.leave(how)
            core.forget_if_gone(self._core)
        bound_s = self._opener.settings.timeout_s if timeout_s is None else timeout_s
        if not await self._link.wait(left, bound_s):
            self._end(CallTimeout(f"no answer for {bound_s:g} s: session {self.id!r} lives until its idle limit"))
        await self._opener.release(self._link)
        left.result()
