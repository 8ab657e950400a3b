"""The client, as asyncio code sees it. The blocking `Client` drives this very class over blocking I/O."""

import secrets
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Literal, Self, TypeVar

from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor import _calls
from conveyor._calls import Calls, Method
from conveyor._core.attachment import Attachment, Claim
from conveyor._core.attachment import Opening as Mode
from conveyor._core.session import Leaving, SessionCore
from conveyor._core.signature import Signature, signature_of
from conveyor._info import Model, SessionInfo
from conveyor._io.base import Io
from conveyor._link import Link
from conveyor._opening import Opening
from conveyor._session import AsyncSession
from conveyor._settings import Settings
from conveyor.errors import CallTimeout, ClientClosed, SessionExists, SessionNotFound

R = TypeVar("R", bound=Message)
Resume = bool | Literal["or-create"]


class AsyncClient:
    """A connection to a Conveyor server. Made by `conveyor.aio.connect`; belongs to one event loop.

    The network is first used by the first call. Sessions share `streams_per_client` streams.
    """

    def __init__(self, io: Io, settings: Settings) -> None:
        self._io = io
        self._settings = settings
        self._call = Calls(io, settings)
        self._links: list[Link] = []
        self._own_links: list[Link] = []
        self._signatures: dict[tuple[str, str, str], Signature] = {}
        self._closed = False

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
        detach_on_exit: bool = False,
        own_stream: bool = False,
    ) -> Opening[AsyncSession]:
        """Opens a session: `async with client.session("charlm") as s`, or `s = await client.session("charlm")`.

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
        if not model and resume is not True:
            raise ValueError("a new session needs the name of a model")
        if resume and session_id is None:
            raise ValueError("resume needs the session_id")
        claim = Claim(
            session_id or secrets.token_hex(16),
            model,
            version or "",
            {False: Mode.CREATE, True: Mode.RESUME, "or-create": Mode.RESUME_OR_CREATE}[resume],
            session_options(max_in_flight, idle_timeout_s),
        )
        return Opening(lambda: self._open(claim, detach_on_exit=detach_on_exit, own_stream=own_stream))

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
    ) -> Opening[AsyncSession]:
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
        chosen = session_id or secrets.token_hex(16)
        request = pb.RestoreSessionRequest(
            snapshot=snapshot,
            session_id=chosen,
            options=session_options(max_in_flight, idle_timeout_s),
            model=model or "",
            version=version or "",
        )

        async def opened() -> AsyncSession:
            await self._create(_calls.RESTORE_SESSION, request, chosen, own_id=session_id is None)
            return await self._resume(chosen, detach_on_exit=detach_on_exit)

        return Opening(opened)

    async def sessions(self, model: str | None = None) -> AsyncGenerator[SessionInfo, None]:
        """All sessions on the server, or those of one model, page by page."""
        token = ""
        while True:
            request = pb.ListSessionsRequest(page_token=token, model=model or "")
            page = await self._call(_calls.LIST_SESSIONS, request)
            for session in page.sessions:
                yield SessionInfo.of(session)
            token = page.next_page_token
            if not token:
                return

    # ------------------------------------------------------------ models

    async def models(self) -> list[Model]:
        """Every model version on the server, also those that are loading or have failed."""
        answer = await self._call(_calls.LIST_MODELS, model_pb2.ListModelsRequest())
        return list(map(Model.of, answer.models))

    async def model(self, name: str, version: str | None = None) -> Model:
        """One model version; None: the latest that is ready.

        Raises:
            ModelNotFound: no such model or version.
        """
        request = model_pb2.GetModelRequest(name=name, version=version or "")
        return Model.of((await self._call(_calls.GET_MODEL, request)).model)

    async def load_model(self, name: str, version: str | None = None, *, timeout_s: float | None = None) -> Model:
        """Loads and warms a version from the server's models folder; returns when it is ready.

        Args:
            name: the model's name.
            version: None: the latest in the folder.
            timeout_s: None: the client's.

        Raises:
            ModelNotFound: not in the folder.
            ModelInvalid: the file cannot be served.
        """
        request = model_pb2.LoadModelRequest(name=name, version=version or "")
        return Model.of((await self._call(_calls.LOAD_MODEL, request, timeout_s=timeout_s)).model)

    async def unload_model(self, name: str, version: str, *, force: bool = False) -> int:
        """Unloads a version and returns how many sessions that closed.

        Raises:
            ModelNotFound: no such model or version.
            ModelInUse: sessions live on it and `force` is not set.
        """
        request = model_pb2.UnloadModelRequest(name=name, version=version, force=force)
        return (await self._call(_calls.UNLOAD_MODEL, request, repeatable=False)).closed_sessions

    # ------------------------------------------------------------ life

    async def close(self) -> None:
        """Detaches from all sessions, which live on, and disconnects. Whoever still waits gets ClientClosed."""
        if self._closed:
            return
        self._closed = True
        try:
            for link in [*self._links, *self._own_links]:
                await link.close()
        finally:
            await self._io.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the client."""
        await self.close()

    # ------------------------------------------------------------ helpers

    async def _open(self, claim: Claim, *, detach_on_exit: bool, own_stream: bool = False) -> AsyncSession:
        link = self._link(claim.session_id if own_stream else None)
        with link as stream:
            core = SessionCore(Attachment(stream.reserve(1)[0], claim), stream.send)
            stream.add(core)
        try:
            signature = await self._signature(await self._opened(link, core))
        except BaseException:
            with link as stream:
                if claim.opening is Mode.CREATE and core.opened.done:
                    core.leave(Leaving.CLOSE)
                core.end(ClientClosed(f"opening session {claim.session_id!r} was given up"))
                stream.forget_if_gone(core)
            await self._release(link)
            raise
        return AsyncSession(self, link, core, signature, detach_on_exit=detach_on_exit)

    async def _opened(self, link: Link, core: SessionCore) -> pb.SessionInfo:
        bound_s = self._settings.timeout_s
        if not await link.wait(core.opened, bound_s):
            raise CallTimeout(f"session {core.attachment.session_id!r} was not opened within {bound_s:g} s")
        return core.opened.result()

    async def _resume(self, session_id: str, *, detach_on_exit: bool) -> AsyncSession:
        return await self._open(Claim(session_id, opening=Mode.RESUME), detach_on_exit=detach_on_exit)

    async def _fork(self, session_id: str, new_id: str | None, *, detach_on_exit: bool) -> AsyncSession:
        chosen = new_id or secrets.token_hex(16)
        request = pb.ForkSessionRequest(session_id=session_id, new_session_id=chosen)
        await self._create(_calls.FORK_SESSION, request, session_id, own_id=new_id is None)
        return await self._resume(chosen, detach_on_exit=detach_on_exit)

    async def _create(self, method: Method[R], request: Message, session_id: str, *, own_id: bool) -> None:
        """Makes a session by a unary call. An id of our own choice that exists already is an earlier try's."""
        try:
            await self._call(method, request, session_id=session_id, repeatable=own_id)
        except SessionExists:
            if not own_id:
                raise

    async def _close_session(self, session_id: str) -> None:
        try:
            await self._call(_calls.CLOSE_SESSION, pb.CloseSessionRequest(session_id=session_id), session_id=session_id)
        except SessionNotFound:
            return

    async def _signature(self, info: pb.SessionInfo) -> Signature:
        key = (info.model, info.version, info.model_digest)
        if key not in self._signatures:
            request = model_pb2.GetModelRequest(name=info.model, version=info.version)
            answer = await self._call(_calls.GET_MODEL, request)
            self._signatures[key] = signature_of(answer.model.spec)
        return self._signatures[key]

    def _link(self, own_id: str | None) -> Link:
        """The link for one more session: the least used, or one of its own."""
        if self._closed:
            raise ClientClosed("the client is closed")
        metadata = list(self._settings.metadata)
        if own_id is not None:
            link = Link(self._io, self._settings.policy, [*metadata, ("x-session-id", own_id)])
            self._own_links.append(link)
            return link
        if len(self._links) < self._settings.streams_per_client:
            self._links.append(Link(self._io, self._settings.policy, metadata))
            return self._links[-1]
        return min(self._links, key=lambda link: link.core.member_count)

    async def _release(self, link: Link) -> None:
        """Closes a link whose only session is gone."""
        if link in self._own_links:
            self._own_links.remove(link)
            await link.close()


def session_options(max_in_flight: int | None, idle_timeout_s: float | None) -> pb.SessionOptions:
    """The contract's message of a session's options; what is None is left to the server."""
    options = pb.SessionOptions(max_in_flight=max_in_flight or 0)
    if idle_timeout_s is not None:
        options.idle_timeout.FromNanoseconds(round(idle_timeout_s * 1e9))
    return options
