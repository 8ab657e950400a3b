"""A sequence's session, where there is a store: found in it, or begun in it.

Invariants: whoever asks is told once; a sequence that begins anew does so once what was there of it is gone, also where
another server had it.
"""

from collections.abc import Callable

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.errors import Refused
from conveyor_server.identity.caller import full_name
from conveyor_server.keeper.beat import Beat
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.creation import Wanted, create
from conveyor_server.sessions import refusals
from conveyor_server.sessions.events import Closed
from conveyor_server.sessions.session import Session

Then = Callable[[Session | Fault], None]


def begin(core: Core, store: Beat, wanted: Wanted, *, replaced: Callable[[Session], None], then: Then) -> None:
    """Begins a sequence; `then` gets its session, or why there is none.

    Args:
        core: what drives the sessions.
        store: where it is kept.
        wanted: the session, by its name.
        replaced: called with a live session of that model and name, which ends for this one.
        then: as above.
    """
    name, model = full_name(wanted.tenant, wanted.session_id), wanted.engine.model

    def created(opened: Session | Fault) -> None:
        if isinstance(opened, Fault) and opened.reason == e.ERROR_REASON_SESSION_EXISTS:
            find(core, store, name, end)
        else:
            then(opened)

    def again() -> None:
        try:
            create(wanted, core, then)
        except Refused as refusal:
            then(refusal.fault)

    def end(former: Session | Fault) -> None:
        if isinstance(former, Fault):
            then(former)
        elif former.engine.model != model:
            # Whoever gave his own session that name keeps it.
            then(refusals.exists(name))
        else:
            replaced(former)
            core.directory.close(former, _Ended(again), core.now())
            core.kick()

    try:
        create(wanted, core, created)
    except Refused as refusal:
        created(refusal.fault)


def find(core: Core, store: Beat, name: str, then: Then) -> None:
    """Calls back with the session of that name, wherever it is, or why there is none."""
    try:
        core.directory.admit(0)
        here = core.directory.sessions.get(name)
        if here is not None:
            then(core.directory.lookup(name))
        else:
            asleep = core.directory.asleep.get(name)
            if asleep is not None:
                store.restore(asleep, then)
            else:
                store.take(name, then)
    except Refused as refusal:
        then(refusal.fault)


class _Ended:
    """Waits for the end of the session that was there."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def closed(self, _: Closed) -> None:
        """It is gone, from here at least."""
        self._then()
