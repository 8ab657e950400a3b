"""A session, as blocking code sees it."""

from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Self

from conveyor._core.signature import Inputs, Outputs
from conveyor._info import Durability, SessionInfo
from conveyor._io.base import drive, iterate
from conveyor._session import AsyncSession


class Session:
    """A recurrent model's state on the server, stepped token by token. Opened by `Client.session`.

    Any thread may call; steps of several threads on one session are applied in the order in which they arrive. Leaving
    its `with` closes the session on the server, unless it was opened with `detach_on_exit=True`. A broken connection is
    resumed beneath it; a session that the server has lost is reported, and never restarted.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def id(self) -> str:
        """The session's id: what it takes to resume it from elsewhere."""
        return self._session.id

    @property
    def info(self) -> SessionInfo:
        """What the server said when it was last attached; `refresh` asks again."""
        return self._session.info

    @property
    def applied_seq(self) -> int:
        """Steps in the session's life that were applied and whose answers have come."""
        return self._session.applied_seq

    @property
    def durable_seq(self) -> int:
        """The last step whose state is in the server's store, as far as was heard; 0 where it is kept in none.

        Where answers leave before that (durability `async`) it is behind `applied_seq` for a moment, and the steps
        between are kept here, to be sent again should the server be lost.
        """
        return self._session.durable_seq

    def step(self, inputs: Inputs, *, timeout_s: float | None = None) -> Outputs:
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
        """
        return drive(self._session.step(inputs, timeout_s=timeout_s))

    def stream(
        self, chunks: Iterable[Inputs], *, in_flight: int | None = None, timeout_s: float | None = None
    ) -> Generator[Outputs, None, None]:
        """Steps through `chunks`, several on their way at once, and yields the answers in order.

        Args:
            chunks: what `step` takes, one after the other. The next one is only pulled when it can be sent at once.
            in_flight: steps that may be unanswered; None: what the server granted. Where the next chunk comes late, as
                from a microphone, or depends on the answer before it, give 1: an answer is then yielded before the next
                chunk is pulled.
            timeout_s: as in `step`, of each.

        Raises:
            ConveyorError: as `step`, at the place of the answer. Steps after it were not applied.
        """
        return iterate(self._session.stream(chunks, in_flight=in_flight, timeout_s=timeout_s))

    def flush(self, *, timeout_s: float | None = None) -> int:
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
        return drive(self._session.flush(timeout_s=timeout_s))

    def refresh(self, *, timeout_s: float | None = None) -> SessionInfo:
        """Asks the server for the session's info now. `timeout_s` None: the client's, here and below."""
        return drive(self._session.refresh(timeout_s=timeout_s))

    def snapshot(self, *, timeout_s: float | None = None) -> bytes:
        """The session's state at a step boundary, for `client.restore`; steps on their way may be in it or not."""
        return drive(self._session.snapshot(timeout_s=timeout_s))

    def fork(
        self,
        *,
        session_id: str | None = None,
        durability: Durability | None = None,
        detach_on_exit: bool = False,
        timeout_s: float | None = None,
    ) -> "Session":
        """A new session with a copy of this one's state and `applied_seq`.

        Args:
            session_id: of the new session; None: chosen.
            durability: as in `client.session`, of the new session.
            detach_on_exit: as in `client.session`.
            timeout_s: as in `client.session`.

        Raises:
            SessionExists: the id is taken.
        """
        opening = self._session.fork(
            session_id=session_id, durability=durability, detach_on_exit=detach_on_exit, timeout_s=timeout_s
        )
        return Session(drive(opening))

    def close(self, *, timeout_s: float | None = None) -> None:
        """Closes the session on the server once its steps are answered. Closing what is gone does nothing.

        Raises:
            SessionTakenOver: it lives on with another client.
            ConnectionLost: nobody could be told; it lives until its idle limit.
        """
        drive(self._session.close(timeout_s=timeout_s))

    def detach(self, *, timeout_s: float | None = None) -> None:
        """Lets go of the session, which lives on until it is resumed, closed or idle for too long.

        Returns once the server has stored what was answered, where the session is kept in a store: resumed anywhere, it
        goes on from there.
        """
        drive(self._session.detach(timeout_s=timeout_s))

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the session, or detaches from it; does nothing to one that was lost, which may have been resumed.

        What ended the block is never hidden by what ends the session.
        """
        drive(self._session.__aexit__(kind, error, traceback))
