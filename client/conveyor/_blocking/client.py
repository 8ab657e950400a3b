"""A client, as blocking code sees it."""

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self

from conveyor._blocking.population import Population
from conveyor._blocking.session import Session
from conveyor._client import AsyncClient, Resume
from conveyor._info import Durability, Migration, Model, SessionInfo
from conveyor._io.base import drive, iterate


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
        durability: Durability | None = None,
        detach_on_exit: bool = False,
        own_stream: bool = False,
        timeout_s: float | None = None,
    ) -> Session:
        """Opens a session: `with client.session("charlm") as s:`.

        Args:
            model: the model's name; may be left out with `resume=True`.
            version: its version; None: the latest that is ready.
            session_id: 1 to 128 of letters, digits and `._:-`; None: chosen.
            resume: True: the session must be there, and is taken over from whoever holds it; `"or-create"`: created
                where it is not; False: it must be new.
            max_in_flight: steps that may be unanswered at once, which bounds `stream`; None: 64. The server's limit
                holds.
            idle_timeout_s: idle time after which the server closes it; the server's limit holds.
            durability: what a new session is worth when its server is lost. `"none"`: it ends with the server's
                process. `"async"`: the server stores it beside the steps, a moment later; this client keeps what is not
                stored yet, and sends it again to the server that takes over: nothing is lost while either lives.
                `"sync"`: an answer comes only when its step is stored. None: the server's setting, which may be more
                than was asked for; `info.durability` says what it is.
            detach_on_exit: leaving the `with` detaches instead of closing.
            own_stream: a stream for this session alone, which carries `x-session-id` for proxies that route by it.
            timeout_s: how long opening may take while there is a connection; None: the client's, here and below.

        Raises:
            ModelNotFound, SessionExists, SessionNotFound, SessionExpired, SessionsExhausted: as the names say.
            NotDurable: the server keeps no session as durable as that.
            ConnectionLost, StoreUnavailable: no server, or no store of its, within `connect_timeout_s`.
            RecordInvalid: what the store has of the session is torn.
        """
        opening = self._client.session(
            model,
            version=version,
            session_id=session_id,
            resume=resume,
            max_in_flight=max_in_flight,
            idle_timeout_s=idle_timeout_s,
            durability=durability,
            detach_on_exit=detach_on_exit,
            own_stream=own_stream,
            timeout_s=timeout_s,
        )
        return Session(drive(opening))

    def population(
        self,
        model: str = "",
        n: int | None = None,
        *,
        version: str | None = None,
        session_ids: Sequence[str] | None = None,
        resume: Resume = False,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        durability: Durability | None = None,
        detach_on_exit: bool = False,
        timeout_s: float | None = None,
    ) -> Population:
        """Opens many sessions that are stepped together, in columns: `with client.population("meter", 500) as p`.

        Args:
            model: as in `session`.
            n: how many; may be left out where `session_ids` says it.
            version: as in `session`.
            session_ids: one for each row; None: chosen.
            resume: as in `session`, for every row.
            max_in_flight: as in `session`, for every row; None: the server's setting.
            idle_timeout_s: as in `session`, for every row.
            durability: as in `session`, for every row.
            detach_on_exit: as in `session`.
            timeout_s: as in `session`.

        Raises:
            ConveyorError: as `session`, of the first row that was refused; the others are closed again.
        """
        opening = self._client.population(
            model,
            n,
            version=version,
            session_ids=session_ids,
            resume=resume,
            max_in_flight=max_in_flight,
            idle_timeout_s=idle_timeout_s,
            durability=durability,
            detach_on_exit=detach_on_exit,
            timeout_s=timeout_s,
        )
        return Population(drive(opening))

    def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        model: str | None = None,
        version: str | None = None,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        durability: Durability | None = None,
        detach_on_exit: bool = False,
        timeout_s: float | None = None,
    ) -> Session:
        """A new session with the state of a snapshot; `applied_seq` goes on from there.

        Args:
            snapshot: what `session.snapshot()` gave.
            session_id: of the new session; None: chosen.
            model: None: the snapshot's own. Another one must compute the same function.
            version: None: the snapshot's own.
            max_in_flight: as in `session`.
            idle_timeout_s: as in `session`.
            durability: as in `session`.
            detach_on_exit: as in `session`.
            timeout_s: as in `session`.

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
            durability=durability,
            detach_on_exit=detach_on_exit,
            timeout_s=timeout_s,
        )
        return Session(drive(opening))

    def sessions(
        self, model: str | None = None, *, timeout_s: float | None = None
    ) -> Generator[SessionInfo, None, None]:
        """All sessions on the server, or those of one model, page by page."""
        return iterate(self._client.sessions(model, timeout_s=timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """Every model version on the server, also those that are loading or have failed."""
        return drive(self._client.models(timeout_s=timeout_s))

    def model(self, name: str, version: str | None = None, *, timeout_s: float | None = None) -> Model:
        """One model version; None: the latest that is ready.

        Raises:
            ModelNotFound: no such model or version.
        """
        return drive(self._client.model(name, version, timeout_s=timeout_s))

    def load_model(
        self, name: str, version: str | None = None, *, reload: bool = False, timeout_s: float | None = None
    ) -> Model:
        """Loads, warms and checks a version from the server's models folder; returns when it is ready.

        One that is ready already is left as it is, and so are its sessions.

        Args:
            name: the model's name.
            version: None: the latest in the folder.
            reload: load the file anew though the version is ready. It takes the former one's place once it has passed;
                where it fails, the former one goes on.
            timeout_s: None: the client's.

        Raises:
            ModelNotFound: not in the folder.
            ModelInvalid: the file cannot be served.
        """
        return drive(self._client.load_model(name, version, reload=reload, timeout_s=timeout_s))

    def unload_model(self, name: str, version: str, *, force: bool = False, timeout_s: float | None = None) -> int:
        """Unloads a version and returns how many sessions that closed.

        Raises:
            ModelNotFound: no such model or version.
            ModelInUse: sessions live on it and `force` is not set.
        """
        return drive(self._client.unload_model(name, version, force=force, timeout_s=timeout_s))

    def migrate_sessions(
        self, name: str, *, source: str | None = None, target: str | None = None, timeout_s: float | None = None
    ) -> Migration:
        """Moves a model's sessions to another of its versions, between two of their steps.

        Those that are in the server's store alone move when the server next brings them in.

        Args:
            name: the model's name.
            source: the version that they leave; None: every other one that has equal inputs, outputs and states.
            target: the version that they move to; None: the latest that is ready.
            timeout_s: None: the client's.

        Raises:
            ModelNotFound: no such model or version.
            ModelMismatch: `source` has other inputs, outputs or states.
        """
        return drive(self._client.migrate_sessions(name, source=source, target=target, timeout_s=timeout_s))

    def close(self) -> None:
        """Detaches from all sessions, which live on, and disconnects. Whoever still waits gets ClientClosed.

        Where steps were answered that the server's store does not have yet (durability `async`), it waits for them, and
        sends them again where that is what it takes, but not for longer than `timeout_s`. What was not stored even then
        is lost if that server is; it is what lies between a session's `durable_seq` and its `applied_seq`, which can
        still be read.
        """
        drive(self._client.close())

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the client."""
        self.close()
