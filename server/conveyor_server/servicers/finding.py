"""Sessions by their ids, for unary calls: in memory, asleep, or in the store.

Invariant: a call that steps or changes a session does it here, where the session lives from then on; one that only
looks moves nothing.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2 as pb

from conveyor_server.errors import Refused
from conveyor_server.identity.caller import Caller, prefix
from conveyor_server.servicers.convert import session_info
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.creation import Wanted, create
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Record

T = TypeVar("T")


async def created(wanted: Wanted, core: Core) -> Session:
    """A new session.

    Raises:
        Refused: as servicers.creation.create.
    """
    return await _told(lambda then: create(wanted, core, then))


async def found(session_id: str, core: Core, *, epoch: int = 0) -> tuple[Session, int]:
    """The session, in memory, and the epoch under which a call of that epoch steps it.

    Args:
        session_id: its full name.
        core: what drives the sessions.
        epoch: of the caller; 0: any.

    Raises:
        Refused: SESSION_NOT_FOUND and the like, SESSION_TAKEN_OVER, STORE_UNAVAILABLE, RECORD_INVALID, or why its model
            is not served.
    """
    directory, store = core.directory, core.store
    while True:
        here = directory.sessions.get(session_id)
        if store is None or (here is not None and (not here.stored or here.attachment is not None)):
            return directory.lookup(session_id), epoch
        if here is not None and here.closing is None:
            # No stream holds it here: another server may have it by now, which nobody has told.
            record = await _peeked(session_id, core)
            if record is not None and record.epoch == here.epoch and directory.sessions.get(session_id) is here:
                return directory.lookup(session_id), epoch
        session, epoch = await _let_in(session_id, core, epoch)
        # Whoever is told so late that it has left again asks anew.
        if directory.sessions.get(session_id) is session:
            return session, epoch


async def _let_in(session_id: str, core: Core, epoch: int) -> tuple[Session, int]:
    """As `found`, of a session that another server may have, or nobody; it may have left when this returns."""
    directory, store = core.directory, core.store
    if store is None:
        raise AssertionError("there is no store")
    asleep = directory.asleep.get(session_id)
    if asleep is not None:
        return await _told(lambda then: store.restore(asleep, then)), epoch
    directory.admit(0)

    def take(then: Callable[[Session | Fault], None]) -> None:
        store.take(session_id, then, max_epoch=epoch)

    session = await _told(take)
    return session, session.epoch if epoch else 0


async def durable(session: Session, core: Core, seq: int) -> None:
    """Returns once the session's state after that step is in the store.

    Raises:
        Refused: STORE_UNAVAILABLE, SESSION_TAKEN_OVER.
    """
    store = core.store
    if store is None or session.durable_seq >= seq:
        return
    waits: asyncio.Future[Fault | None] = asyncio.get_running_loop().create_future()

    def told(fault: Fault | None) -> None:
        if not waits.done():
            waits.set_result(fault)

    store.when_durable(session, told)
    fault = await waits
    if fault is not None:
        raise Refused(fault)


async def stored_info(session_id: str, core: Core, caller: Caller) -> pb.SessionInfo:
    """Describes a caller's session, wherever it is.

    Raises:
        Refused: SESSION_NOT_FOUND and the like, STORE_UNAVAILABLE, RECORD_INVALID.
    """
    name = caller.full_name(session_id)
    here = core.directory.sessions.get(name)
    if core.store is None or (here is not None and not here.stored):
        return session_info(core.directory.lookup(name), core, caller)
    record = await _peeked(name, core)
    here = core.directory.sessions.get(name)
    if record is None:
        if here is not None and not here.stored:
            return session_info(core.directory.lookup(name), core, caller)
        raise Refused(core.directory.why_gone(name))
    if here is not None and here.epoch == record.epoch:
        return session_info(core.directory.lookup(name), core, caller)
    return record_info(record, core, caller)


async def stored_page(
    request: pb.ListSessionsRequest, size: int, core: Core, caller: Caller
) -> pb.ListSessionsResponse:
    """A page of a caller's sessions by id: those in the store, and this server's own that are in memory alone.

    Raises:
        Refused: STORE_UNAVAILABLE.
    """
    store = core.store
    if store is None:
        raise AssertionError("there is no store")
    after, theirs = caller.full_name(request.page_token), prefix(caller.tenant)
    page = await store.call(lambda: store.store.listed(after, size, request.model, caller.tenant))
    ids = {record.session_id: record for record in page.records}
    own = {
        key: session
        for key, session in core.directory.sessions.items()
        if not session.stored and request.model in {"", session.engine.model} and key.startswith(theirs)
    }
    chosen = sorted({*ids, *(key for key in own if key > after)})
    more = page.more or len(chosen) > size
    if page.more and page.records:
        # What lies behind the last of the store's is for the next page.
        chosen = [key for key in chosen if key <= page.records[-1].session_id]
    chosen = chosen[:size]
    infos = []
    for key in chosen:
        here = core.directory.sessions.get(key)
        if here is not None and (key not in ids or here.epoch == ids[key].epoch):
            infos.append(session_info(here, core, caller))
        elif key in ids:
            infos.append(record_info(ids[key], core, caller))
    return pb.ListSessionsResponse(
        sessions=infos,
        next_page_token=caller.shown(chosen[-1]) if more and chosen else "",
        total_size=page.total + len(own),
    )


def record_info(record: Record, core: Core, caller: Caller) -> pb.SessionInfo:
    """A caller's session as the store has it.

    Raises:
        Refused: RECORD_INVALID.
    """
    store = core.store
    if store is None:
        raise AssertionError("there is no store")
    content = store.keeper.revival.head(record)
    asleep = core.directory.asleep.get(record.session_id)
    info = pb.SessionInfo(
        session_id=caller.shown(record.session_id),
        model=content.model,
        version=content.version,
        model_digest=content.model_digest,
        epoch=record.epoch,
        applied_seq=record.seq,
        max_in_flight=content.max_in_flight,
        idle_timeout=content.idle_timeout,
        created_at=content.created_at,
        attached=asleep is not None and asleep.attachment is not None,
        durability=content.durability,
        durable_seq=record.seq,
        resident=False,
    )
    info.last_used_at.FromNanoseconds(round((record.expires_at - content.idle_timeout.ToNanoseconds() / 1e9) * 1e9))
    return info


async def _peeked(session_id: str, core: Core) -> Record | None:
    """What the store has of a session; None: nothing.

    Raises:
        Refused: STORE_UNAVAILABLE.
    """

    def peek(then: Callable[[Record | Fault | None], None]) -> None:
        if core.store is None:
            raise AssertionError("there is no store")
        core.store.peek(session_id, then)

    record: Record | None = await _told(peek)
    return record


async def _told(ask: Callable[[Callable[[T | Fault], None]], None]) -> T:
    """What `ask` has its argument called with.

    Raises:
        Refused: a fault.
    """
    answer: asyncio.Future[T | Fault] = asyncio.get_running_loop().create_future()

    def tell(what: T | Fault) -> None:
        if not answer.done():
            answer.set_result(what)

    ask(tell)
    told = await answer
    if isinstance(told, Fault):
        raise Refused(told)
    return told
