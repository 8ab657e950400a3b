"""Opens sessions and populations for one client, on links that it keeps; what both ask of the client is here."""

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor import _calls
from conveyor._calls import Calls, Method
from conveyor._core.attachment import Attachment, Claim, Opening
from conveyor._core.member import Leaving
from conveyor._core.population import PopulationCore
from conveyor._core.session import SessionCore
from conveyor._core.signature import Signature, signature_of
from conveyor._io.base import Io
from conveyor._link import Link
from conveyor._population import AsyncPopulation
from conveyor._session import AsyncSession
from conveyor._settings import Settings
from conveyor.errors import CallTimeout, ClientClosed, SessionExists, SessionNotFound

R = TypeVar("R", bound=Message)
C = TypeVar("C", SessionCore, PopulationCore)


class Opener:
    """One client's links, calls and signatures.

    Attributes:
        io: threads or asyncio.
        settings: the client's.
        call: makes unary calls.
    """

    def __init__(self, io: Io, settings: Settings) -> None:
        self.io = io
        self.settings = settings
        self.call = Calls(io, settings)
        self._shared: list[Link] = []
        self._own: list[Link] = []
        self._signatures: dict[tuple[str, str, str], Signature] = {}
        self._closed = False

    async def session(
        self, claim: Claim, *, detach_on_exit: bool, own_stream: bool = False, timeout_s: float | None = None
    ) -> AsyncSession:
        """Attaches one session, to a shared stream or one of its own."""
        link = self._own_link(claim.session_id) if own_stream else self._shared_link()
        with link as stream:
            core = SessionCore(Attachment(stream.reserve(1)[0], claim), stream, self.settings.resend_buffer_bytes)
            stream.add(core)
        what = f"session {claim.session_id!r}"
        signature = await self._opened(link, core, what, creates=_creates(claim), timeout_s=timeout_s)
        core.use(signature)
        return AsyncSession(self, link, core, signature, detach_on_exit=detach_on_exit)

    async def population(
        self, claims: Sequence[Claim], *, detach_on_exit: bool, timeout_s: float | None = None
    ) -> AsyncPopulation:
        """Attaches every claim to a stream of their own; all or none."""
        link = self._own_link()
        with link as stream:
            core = PopulationCore(stream.reserve(len(claims)), claims, stream, self.settings.resend_buffer_bytes)
            stream.add(core)
        creates = _creates(claims[0])
        core.use(await self._opened(link, core, "the population", creates=creates, timeout_s=timeout_s))
        return AsyncPopulation(self, link, core, detach_on_exit=detach_on_exit)

    async def fork(
        self,
        session_id: str,
        new_id: str | None,
        options: pb.SessionOptions,
        *,
        detach_on_exit: bool,
        timeout_s: float | None = None,
    ) -> AsyncSession:
        """A copy of a session, opened."""

        def request(chosen: str) -> Message:
            return pb.ForkSessionRequest(session_id=session_id, new_session_id=chosen, options=options)

        return await self.made(
            _calls.FORK_SESSION, request, new_id, route=session_id, detach_on_exit=detach_on_exit, timeout_s=timeout_s
        )

    async def made(
        self,
        method: Method[R],
        request: Callable[[str], Message],
        session_id: str | None,
        *,
        route: str = "",
        detach_on_exit: bool,
        timeout_s: float | None = None,
    ) -> AsyncSession:
        """Makes a session by a unary call, and attaches it.

        Args:
            method: what makes it.
            request: its message, given the new id.
            session_id: the new id; None: chosen, and then the call may be repeated.
            route: the session whose server is to be called, where it is not the new one's.
            detach_on_exit: as in `session`.
            timeout_s: of each of the two; None: the client's.

        Raises:
            SessionExists: the caller's id is taken.
        """
        chosen = session_id or secrets.token_hex(16)
        try:
            await self.call(
                method,
                request(chosen),
                session_id=route or chosen,
                timeout_s=timeout_s,
                repeatable=session_id is None,
            )
        except SessionExists:
            # An id of our own choice exists because an earlier try made it, whose answer was lost.
            if session_id is not None:
                raise
        claim = Claim(chosen, opening=Opening.RESUME)
        return await self.session(claim, detach_on_exit=detach_on_exit, timeout_s=timeout_s)

    async def close_session(self, session_id: str, timeout_s: float | None = None) -> None:
        """Closes a session that is attached to nothing here; one that is gone is closed."""
        request = pb.CloseSessionRequest(session_id=session_id)
        try:
            await self.call(_calls.CLOSE_SESSION, request, session_id=session_id, timeout_s=timeout_s)
        except SessionNotFound:
            return

    async def release(self, link: Link) -> None:
        """Closes a link whose only member is gone."""
        if link in self._own:
            self._own.remove(link)
            await link.close()

    async def close(self) -> None:
        """Closes every link, then the connection. The server is given `timeout_s` to store what it has."""
        if self._closed:
            return
        self._closed = True
        until_s = self.io.now_s() + self.settings.timeout_s
        try:
            links = [*self._shared, *self._own]
            for link, tickets in [(link, link.leave()) for link in links]:
                for ticket in tickets:
                    await link.settled(ticket, max(0.0, until_s - self.io.now_s()))
            for link in links:
                await link.close()
        finally:
            await self.io.close()

    # ------------------------------------------------------------ helpers

    async def _opened(self, link: Link, core: C, what: str, *, creates: bool, timeout_s: float | None) -> Signature:
        """Waits until a member is attached and its model is known; or else undoes it."""
        bound_s = self.settings.timeout_s if timeout_s is None else timeout_s
        try:
            if not await link.wait(core.opened, bound_s, core):
                _too_late(f"{what} was not opened within {bound_s:g} s")
            return await self._signature(core.opened.result())
        except BaseException:
            with link as stream:
                if creates and core.opened.done:
                    core.leave(Leaving.CLOSE)
                core.end(ClientClosed(f"opening {what} was given up"))
                stream.forget_if_gone(core)
            await self.release(link)
            raise

    async def _signature(self, info: pb.SessionInfo) -> Signature:
        key = (info.model, info.version, info.model_digest)
        if key not in self._signatures:
            request = model_pb2.GetModelRequest(name=info.model, version=info.version, digest=info.model_digest)
            answer = await self.call(_calls.GET_MODEL, request)
            self._signatures[key] = signature_of(answer.model.spec)
        return self._signatures[key]

    def _shared_link(self) -> Link:
        """The link for one more session."""
        self._check_open()
        with self.io.lock:
            if len(self._shared) < self.settings.streams_per_client:
                self._shared.append(Link(self.io, self.settings.policy, self.settings.headers))
                return self._shared[-1]
        return min(self._shared, key=lambda link: link.core.member_count)

    def _own_link(self, session_id: str = "") -> Link:
        """A link for one member alone; with the session's id for proxies, where it is one session."""
        self._check_open()
        link = Link(self.io, self.settings.policy, partial(self.settings.headers, session_id))
        self._own.append(link)
        return link

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed")


def _too_late(message: str) -> None:
    raise CallTimeout(message)


def _creates(claim: Claim) -> bool:
    return claim.opening is Opening.CREATE
