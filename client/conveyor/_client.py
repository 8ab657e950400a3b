"""The client, as asyncio code sees it. The blocking `Client` drives this very class over blocking I/O."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Literal, Self

from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb

from conveyor import _calls
from conveyor._core.attachment import Claim
from conveyor._core.attachment import Opening as Mode
from conveyor._info import Durability, Migration, Model, SessionInfo, session_options
from conveyor._io.base import Io
from conveyor._opener import Opener
from conveyor._opening import Opening
from conveyor._population import AsyncPopulation
from conveyor._session import AsyncSession
from conveyor._settings import Settings

Resume = bool | Literal["or-create"]

# Measured: a pipelined session on 64 costs half of one on 16 (messages of 32 steps), and on 128 hardly less.
_IN_FLIGHT = 64


class AsyncClient:
    """A connection to a Conveyor server. Made by `conveyor.aio.connect`; belongs to one event loop.

    The network is first used by the first call. Sessions share `streams_per_client` streams.
    """

    def __init__(self, io: Io, settings: Settings) -> None:
        self._opener = Opener(io, settings)
        self._call = self._opener.call

    # ------------------------------------------------------------ sessions

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
    ) -> Opening[AsyncSession]:
        """Opens a session: `async with client.session("charlm") as s`, or `s = await client.session("charlm")`.

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
        if resume and session_id is None:
            raise ValueError("resume needs the session_id")
        opened = self._opener.session
        claim = Claim(
            session_id or secrets.token_hex(16),
            model,
            version or "",
            opening(model, resume),
            session_options(max_in_flight or _IN_FLIGHT, idle_timeout_s, durability),
        )
        return Opening(lambda: opened(claim, detach_on_exit=detach_on_exit, own_stream=own_stream, timeout_s=timeout_s))

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
    ) -> Opening[AsyncPopulation]:
        """Opens many sessions that are stepped together, in columns: `async with client.population("meter", 500) as p`.

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
        if session_ids is None and (resume or n is None):
            raise ValueError("a population needs n or session_ids" if n is None else "resume needs the session_ids")
        ids = [secrets.token_hex(16) for _ in range(n or 0)] if session_ids is None else list(session_ids)
        if not ids or n not in (None, len(ids)) or len(set(ids)) != len(ids):
            raise ValueError(f"a population has one or more rows of different ids; n is {n} and {len(ids)} ids came")
        options = session_options(max_in_flight, idle_timeout_s, durability)
        opened = self._opener.population
        claims = [Claim(each, model, version or "", opening(model, resume), options) for each in ids]
        return Opening(lambda: opened(claims, detach_on_exit=detach_on_exit, timeout_s=timeout_s))

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
    ) -> Opening[AsyncSession]:
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
        options = session_options(max_in_flight or _IN_FLIGHT, idle_timeout_s, durability)

        def request(chosen: str) -> pb.RestoreSessionRequest:
            return pb.RestoreSessionRequest(
                snapshot=snapshot, session_id=chosen, options=options, model=model or "", version=version or ""
            )

        made = self._opener.made
        return Opening(
            lambda: made(
                _calls.RESTORE_SESSION, request, session_id, detach_on_exit=detach_on_exit, timeout_s=timeout_s
            )
        )

    async def sessions(
        self, model: str | None = None, *, timeout_s: float | None = None
    ) -> AsyncGenerator[SessionInfo, None]:
        """All sessions on the server, or those of one model, page by page."""
        token = ""
        while True:
            request = pb.ListSessionsRequest(page_token=token, model=model or "")
            page = await self._call(_calls.LIST_SESSIONS, request, timeout_s=timeout_s)
            for session in page.sessions:
                yield SessionInfo.of(session)
            token = page.next_page_token
            if not token:
                return

    # ------------------------------------------------------------ models

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """Every model version on the server, also those that are loading or have failed."""
        answer = await self._call(_calls.LIST_MODELS, model_pb2.ListModelsRequest(), timeout_s=timeout_s)
        return list(map(Model.of, answer.models))

    async def model(self, name: str, version: str | None = None, *, timeout_s: float | None = None) -> Model:
        """One model version; None: the latest that is ready.

        Raises:
            ModelNotFound: no such model or version.
        """
        request = model_pb2.GetModelRequest(name=name, version=version or "")
        return Model.of((await self._call(_calls.GET_MODEL, request, timeout_s=timeout_s)).model)

    async def load_model(
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
        request = model_pb2.LoadModelRequest(name=name, version=version or "", reload=reload)
        return Model.of((await self._call(_calls.LOAD_MODEL, request, timeout_s=timeout_s)).model)

    async def unload_model(
        self, name: str, version: str, *, force: bool = False, timeout_s: float | None = None
    ) -> int:
        """Unloads a version and returns how many sessions that closed.

        Raises:
            ModelNotFound: no such model or version.
            ModelInUse: sessions live on it and `force` is not set.
        """
        request = model_pb2.UnloadModelRequest(name=name, version=version, force=force)
        answer = await self._call(_calls.UNLOAD_MODEL, request, timeout_s=timeout_s, repeatable=False)
        return answer.closed_sessions

    async def migrate_sessions(
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
        request = model_pb2.MigrateSessionsRequest(name=name, from_version=source or "", to_version=target or "")
        answer = await self._call(_calls.MIGRATE_SESSIONS, request, timeout_s=timeout_s)
        return Migration(answer.migrated_sessions, answer.to_version)

    # ------------------------------------------------------------ life

    async def close(self) -> None:
        """Detaches from all sessions, which live on, and disconnects. Whoever still waits gets ClientClosed.

        Where steps were answered that the server's store does not have yet (durability `async`), it waits for them, and
        sends them again where that is what it takes, but not for longer than `timeout_s`. What was not stored even then
        is lost if that server is; it is what lies between a session's `durable_seq` and its `applied_seq`, which can
        still be read.
        """
        await self._opener.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the client."""
        await self.close()


def opening(model: str, resume: Resume) -> Mode:
    """How a session is opened the first time.

    Raises:
        ValueError: a session may have to be created, and no model was named.
    """
    if not model and resume is not True:
        raise ValueError("a new session needs the name of a model")
    return {False: Mode.CREATE, True: Mode.RESUME, "or-create": Mode.RESUME_OR_CREATE}[resume]
