"""SessionService's unary calls: for simple clients, and for looking after sessions that streams use.

Translates only: refusals are raised as they come, and whoever binds the methods to a transport turns them into status.
"""

import asyncio
import heapq

from conveyor_proto.v1 import session_pb2 as pb

from conveyor_server import snapshot
from conveyor_server.errors import Refused
from conveyor_server.identity.caller import of_call, prefix
from conveyor_server.seal import Seal
from conveyor_server.servicers.convert import (
    idle_timeout_s,
    missing,
    output_tensors,
    session_info,
    submission,
)
from conveyor_server.servicers.core import Core, Waiter
from conveyor_server.servicers.creation import Wanted
from conveyor_server.servicers.finding import created, durable, found, stored_info, stored_page
from conveyor_server.sessions.session import Session

_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000


class SessionServicer:
    """One method for each unary call, named as it is. Core thread only.

    Args:
        core: what drives the sessions.
        seal: of snapshots.
    """

    def __init__(self, core: Core, seal: Seal = snapshot.PLAIN) -> None:
        self._core = core
        self._seal = seal

    async def create_session(self, request: pb.CreateSessionRequest) -> pb.CreateSessionResponse:
        """Creates a session that no stream holds."""
        if not request.model:
            raise missing("model", "is needed to create a session")
        caller = of_call()
        wanted = Wanted(
            self._core.repository.find(request.model, request.version, caller.uses).serving,
            session_id=request.session_id,
            max_in_flight=request.options.max_in_flight,
            idle_timeout_s=idle_timeout_s(request.options),
            durability=request.options.durability,
            tenant=caller.tenant,
            max_sessions=caller.max_sessions,
        )
        return pb.CreateSessionResponse(session=self._info(await created(wanted, self._core)))

    async def step(self, request: pb.StepRequest) -> pb.StepResponse:
        """Applies one step and returns its answer. A caller that goes away takes back a step that has not run."""
        core = self._core
        session, epoch = await found(of_call().full_name(request.session_id), core, epoch=request.epoch)
        waiter = Waiter()
        step = submission(
            session.engine.reader.read(request.inputs, core.max_time_steps),
            core.directory.limits,
            seq=request.seq,
            reply_to=waiter,
            epoch=epoch,
            timeout_ms=request.timeout_ms,
            acked_seq=request.acked_seq,
        )
        core.directory.submit(session, step, core.now())
        core.kick()
        try:
            answer = await waiter.answer()
        except asyncio.CancelledError:
            core.directory.cancel(session, request.seq, waiter)
            core.kick()
            raise
        if answer.fault is not None:
            raise Refused(answer.fault)
        if session.durability == pb.DURABILITY_SYNC:
            await durable(session, core, answer.seq)
        response = pb.StepResponse(seq=answer.seq, outputs=output_tensors(answer), replayed=answer.replayed)
        if core.says_durable:
            response.durable_seq = session.durable_seq
        return response

    async def get_session(self, request: pb.GetSessionRequest) -> pb.GetSessionResponse:
        """Describes a session."""
        return pb.GetSessionResponse(session=await stored_info(request.session_id, self._core, of_call()))

    async def list_sessions(self, request: pb.ListSessionsRequest) -> pb.ListSessionsResponse:
        """A page of the caller's sessions by id: one that lives throughout is on exactly one page."""
        size, caller = min(request.page_size or _PAGE_SIZE, _MAX_PAGE_SIZE), of_call()
        if self._core.store is not None:
            return await stored_page(request, size, self._core, caller)
        sessions, theirs = self._core.directory.sessions, prefix(caller.tenant)
        names = [
            name
            for name, session in sessions.items()
            if request.model in {"", session.engine.model} and name.startswith(theirs)
        ]
        after = caller.full_name(request.page_token)
        page = heapq.nsmallest(size + 1, (name for name in names if name > after))
        return pb.ListSessionsResponse(
            sessions=[self._info(sessions[name]) for name in page[:size]],
            next_page_token=caller.shown(page[size - 1]) if len(page) > size else "",
            total_size=len(names),
        )

    async def fork_session(self, request: pb.ForkSessionRequest) -> pb.ForkSessionResponse:
        """A new session that goes on from where another is."""
        parent, _ = await found(of_call().full_name(request.session_id), self._core)
        options, granted = request.options, parent.options
        wanted = Wanted(
            parent.engine,
            session_id=request.new_session_id,
            max_in_flight=options.max_in_flight or granted.max_in_flight,
            idle_timeout_s=idle_timeout_s(options) or granted.idle_timeout_s,
            durability=options.durability or granted.durability,
            tenant=granted.tenant,
            max_sessions=of_call().max_sessions,
            states=parent.engine.read(parent.lane),
            applied_seq=parent.applied_seq,
            applied_time_steps=parent.applied_time_steps,
        )
        session = await created(wanted, self._core)
        return pb.ForkSessionResponse(session=self._info(session))

    async def snapshot_session(self, request: pb.SnapshotSessionRequest) -> pb.SnapshotSessionResponse:
        """A session's state at its last step boundary, to keep."""
        session, _ = await found(of_call().full_name(request.session_id), self._core)
        data = snapshot.take(session, self._core.timestamp(self._core.now()), self._seal)
        return pb.SnapshotSessionResponse(snapshot=data, applied_seq=session.applied_seq)

    async def restore_session(self, request: pb.RestoreSessionRequest) -> pb.RestoreSessionResponse:
        """A new session that goes on from a snapshot."""
        content = snapshot.read(request.snapshot, self._seal)
        # The digest is the judge: the snapshot's own version may be gone while the same model is there under another.
        caller = of_call()
        engine = self._core.repository.find(request.model or content.model, request.version, caller.uses).serving
        wanted = Wanted(
            engine,
            session_id=request.session_id,
            max_in_flight=request.options.max_in_flight,
            idle_timeout_s=idle_timeout_s(request.options),
            durability=request.options.durability,
            tenant=caller.tenant,
            max_sessions=caller.max_sessions,
            states=snapshot.states_for(content, engine),
            applied_seq=content.applied_seq,
            applied_time_steps=content.applied_time_steps,
        )
        session = await created(wanted, self._core)
        return pb.RestoreSessionResponse(session=self._info(session))

    async def close_session(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        """Closes a session once its accepted steps are answered."""
        session, _ = await found(of_call().full_name(request.session_id), self._core)
        waiter = Waiter()
        self._core.directory.close(session, waiter, self._core.now())
        self._core.kick()
        return pb.CloseSessionResponse(applied_seq=(await waiter.close()).applied_seq)

    def _info(self, session: Session) -> pb.SessionInfo:
        return session_info(session, self._core, of_call())
