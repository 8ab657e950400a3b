"""The blocking client: the asynchronous one, driven without an event loop.

Invariant: no rule lives here. Each method drives its namesake, whose primitives block (see `_io`); any thread may call.
"""

from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Self

from conveyor._client import AsyncClient, Resume
from conveyor._core.signature import Inputs, Outputs
from conveyor._info import Model, SessionInfo
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
            CallTimeout: no answer although the connection stands; or ConnectionLost: no connection for
                `resume_timeout_s`. Whether it was applied is unknown, and this object is of no more use: open the
                session again with `resume=True` and compare `applied_seq`.
            SessionNotFound, SessionTakenOver: the session is gone, or somebody else's.
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

    def refresh(self) -> SessionInfo:
        """Asks the server for the session's info now."""
        return drive(self._session.refresh())

    def snapshot(self) -> bytes:
        """The session's state at a step boundary, for `client.restore`; steps on their way may be in it or not."""
        return drive(self._session.snapshot())

    def fork(self, *, session_id: str | None = None, detach_on_exit: bool = False) -> "Session":
        """A new session with a copy of this one's state and `applied_seq`.

        Args:
            session_id: of the new session; None: chosen.
            detach_on_exit: as in `client.session`.

        Raises:
            SessionExists: the id is taken.
        """
        return Session(drive(self._session.fork(session_id=session_id, detach_on_exit=detach_on_exit)))

    def close(self) -> None:
        """Closes the session on the server once its steps are answered. Closing what is gone does nothing.

        Raises:
            SessionTakenOver: it lives on with another client.
            ConnectionLost: nobody could be told; it lives until its idle limit.
        """
        drive(self._session.close())

    def detach(self) -> None:
        """Lets go of the session, which lives on until it is resumed, closed or idle for too long."""
        drive(self._session.detach())

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the session, or detaches from it. What ended the block is never hidden by what ends the session."""
        drive(self._session.__aexit__(kind, error, traceback))


class Client:
    """A connection to a Conveyor server. Made by `conveyor.connect`; any thread may call.

    The network is first used by the first call. Sessions share `streams_per_client` streams.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def session(
        self,
        model: str = "",
        *,
        version: str | None = None,
        session_id: str | None = None,
        resume: Resume = False,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        detach_on_exit: bool = False,
        own_stream: bool = False,
    ) -> Session:
        """Opens a session: `with client.session("charlm") as s:`.

        Args:
            model: the model's name; may be left out with `resume=True`.
            version: its version; None: the latest that is ready.
            session_id: 1 to 128 of letters, digits and `._:-`; None: chosen.
            resume: True: the session must be there, and is taken over from whoever holds it; `"or-create"`: created
                where it is not; False: it must be new.
            max_in_flight: steps that may be unanswered at once; the server's limit holds.
            idle_timeout_s: idle time after which the server closes it; the server's limit holds.
            detach_on_exit: leaving the `with` detaches instead of closing.
            own_stream: a stream for this session alone, which carries `x-session-id` for proxies that route by it.

        Raises:
            ModelNotFound, SessionExists, SessionNotFound, SessionExpired, SessionsExhausted: as the names say.
            ConnectionLost: no server within `connect_timeout_s`.
        """
        opening = self._client.session(
            model,
            version=version,
            session_id=session_id,
            resume=resume,
            max_in_flight=max_in_flight,
            idle_timeout_s=idle_timeout_s,
            detach_on_exit=detach_on_exit,
            own_stream=own_stream,
        )
        return Session(drive(opening))

    def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        model: str | None = None,
        version: str | None = None,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        detach_on_exit: bool = False,
    ) -> Session:
        """A new session with the state of a snapshot; `applied_seq` goes on from there.

        Args:
            snapshot: what `session.snapshot()` gave.
            session_id: of the new session; None: chosen.
            model: None: the snapshot's own. Another one must compute the same function.
            version: None: the snapshot's own.
            max_in_flight: as in `session`.
            idle_timeout_s: as in `session`.
            detach_on_exit: as in `session`.

        Raises:
            SnapshotInvalid: cut or altered.
            ModelMismatch: of another model.
            SessionExists: the id is taken.
        """
        opening = self._client.restore(
            snapshot,
            session_id=session_id,
            model=model,
            version=version,
            max_in_flight=max_in_flight,
            idle_timeout_s=idle_timeout_s,
            detach_on_exit=detach_on_exit,
        )
        return Session(drive(opening))

    def sessions(self, model: str | None = None) -> Generator[SessionInfo, None, None]:
        """All sessions on the server, or those of one model, page by page."""
        return iterate(self._client.sessions(model))

    def models(self) -> list[Model]:
        """Every model version on the server, also those that are loading or have failed."""
        return drive(self._client.models())

    def model(self, name: str, version: str | None = None) -> Model:
        """One model version; None: the latest that is ready.

        Raises:
            ModelNotFound: no such model or version.
        """
        return drive(self._client.model(name, version))

    def load_model(self, name: str, version: str | None = None, *, timeout_s: float | None = None) -> Model:
        """Loads and warms a version from the server's models folder; returns when it is ready.

        Args:
            name: the model's name.
            version: None: the latest in the folder.
            timeout_s: None: the client's.

        Raises:
            ModelNotFound: not in the folder.
            ModelInvalid: the file cannot be served.
        """
        return drive(self._client.load_model(name, version, timeout_s=timeout_s))

    def unload_model(self, name: str, version: str, *, force: bool = False) -> int:
        """Unloads a version and returns how many sessions that closed.

        Raises:
            ModelNotFound: no such model or version.
            ModelInUse: sessions live on it and `force` is not set.
        """
        return drive(self._client.unload_model(name, version, force=force))

    def close(self) -> None:
        """Detaches from all sessions, which live on, and disconnects. Whoever still waits gets ClientClosed."""
        drive(self._client.close())

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the client."""
        self.close()
