"""How a session begins, in memory or in the store, fresh or from a state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.identity.caller import public_name
from conveyor_server.keeper.held import disown
from conveyor_server.keeper.policy import not_durable
from conveyor_server.servicers.core import Core
from conveyor_server.sessions import refusals
from conveyor_server.sessions.keeping import Kept
from conveyor_server.sessions.session import Durability, Session, SessionOptions
from conveyor_server.store.contract import Record


@dataclass(frozen=True, slots=True)
class Wanted:
    """A session that is to be.

    Attributes:
        engine: of its model version.
        session_id: what its tenant calls it; "": the server chooses.
        max_in_flight, idle_timeout_s, durability: what is asked for; zeros take the defaults.
        tenant: whose it is; "": nobody's.
        max_sessions: of the tenant's own; 0: as of all.
        states: one `[*shape]` array for each of ModelSpec.states; None: fresh.
        applied_seq, applied_time_steps: what the states have in them.
    """

    engine: Engine
    session_id: str = ""
    max_in_flight: int = 0
    idle_timeout_s: float = 0.0
    durability: Durability = session_pb2.DURABILITY_UNSPECIFIED
    tenant: str = ""
    max_sessions: int = 0
    states: Sequence[Array] | None = None
    applied_seq: int = 0
    applied_time_steps: int = 0


def create(wanted: Wanted, core: Core, then: Callable[[Session | Fault], None]) -> None:
    """Calls `then` with the session, at once or once the store has it; or with STORE_UNAVAILABLE, or as below.

    Raises:
        Refused: NOT_DURABLE, DRAINING, SESSIONS_EXHAUSTED, SESSION_EXISTS or SESSION_ID_INVALID.
    """
    directory, store = core.directory, core.store
    if store is None:
        if wanted.durability > session_pb2.DURABILITY_NONE:
            raise not_durable(wanted.durability, session_pb2.DURABILITY_NONE)
        plain = directory.limits.grant(wanted.max_in_flight, wanted.idle_timeout_s, wanted.tenant)
        then(_in_memory(wanted, core, plain, wanted.session_id))
        return
    directory.admit(0)
    name = directory.new_name(wanted.session_id, wanted.tenant)
    options = store.policy.grant(
        directory.limits,
        wanted.durability,
        max_in_flight=wanted.max_in_flight,
        idle_timeout_s=wanted.idle_timeout_s,
        tenant=wanted.tenant,
    )
    if options.durability == session_pb2.DURABILITY_NONE:
        if not wanted.session_id:
            then(_in_memory(wanted, core, options, public_name(name)))
            return

        def unless_stored(found: Record | Fault | None) -> None:
            if found is not None:
                then(found if isinstance(found, Fault) else refusals.exists(name))
                return
            try:
                _forget(name, core)
                session = _in_memory(wanted, core, options, wanted.session_id)
            except Refused as refusal:
                then(refusal.fault)
            else:
                then(session)

        store.peek(name, unless_stored)
        return
    kept = Kept(
        name,
        wanted.engine,
        options,
        _first_epoch(core),
        wanted.states,
        wanted.applied_seq,
        wanted.applied_time_steps,
        wanted.applied_seq,
        core.now(),
        max_sessions=wanted.max_sessions,
    )
    store.create(kept, then)


def _first_epoch(core: Core) -> int:
    """Microseconds: above what any session of that name can have come to."""
    return round(core.wall(core.now()) * 1e6)


def _forget(session_id: str, core: Core) -> None:
    """Lets go of a session that this server knows and the store does not."""
    known = core.directory.sessions.get(session_id) or core.directory.asleep.get(session_id)
    if known is not None and known.stored and known.closing is None:
        disown(core.directory, known, refusals.lost(known), session_pb2.DETACH_CAUSE_CLOSED, core.now())
        core.kick()


def _in_memory(wanted: Wanted, core: Core, options: SessionOptions, session_id: str) -> Session:
    if core.store is not None:
        core.store.keeper.room.make_one(core.now())
    return core.directory.restore(
        wanted.engine,
        wanted.states,
        core.now(),
        applied_seq=wanted.applied_seq,
        applied_time_steps=wanted.applied_time_steps,
        session_id=session_id,
        tenant=wanted.tenant,
        max_of_tenant=wanted.max_sessions,
        max_in_flight=options.max_in_flight,
        idle_timeout_s=options.idle_timeout_s,
    )
