"""How sessions come to a stream: attached, awaited from the store, woken; and what comes for them meanwhile.

Invariant: what is about one session is done in the order in which it came, however long the session takes to come;
other sessions of the stream do not wait for it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import Refused
from conveyor_server.identity.caller import Caller
from conveyor_server.keeper.held import Held
from conveyor_server.keeper.token import ResumeToken
from conveyor_server.servicers.attach import Found, open_session
from conveyor_server.servicers.convert import session_info
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Attachment
from conveyor_server.sessions.refusals import store_away
from conveyor_server.sessions.session import Session
from conveyor_server.transport.ends import Outlet
from conveyor_server.transport.waiting import Waiting, steps_of


class Call(Protocol):
    """The stream; see StreamCall."""

    number: int
    seats: dict[int, Attachment]
    outlet: Outlet
    is_broken: bool
    ending: bool

    def refuse(self, handle: int, seq: int, fault: Fault) -> None:
        """Refuses something of a handle."""

    def say(self, message: session_pb2.StreamResponse) -> None:
        """Says something."""

    def about(self, handle: int, message: session_pb2.StreamResponse) -> None:
        """Says something of a session, behind its answers."""

    def expect_flush(self) -> None:
        """What was said is sent at the end of the turn."""

    def attached(self, seat: Attachment) -> None:
        """A session has come, under its handle."""

    def moved(self, handle: int, session: Session | None) -> None:
        """The handle's session has a row in the table from now on, or none."""

    def request(self, request: session_pb2.StreamRequest, *, whole: bool = False) -> None:
        """Does what a message asks for."""

    def seat(self, handle: int) -> Attachment | Fault:
        """The session that a handle stands for, or why there is none."""

    def holds(self, seat: Attachment) -> bool:
        """The session is the stream's still."""


class _Away:
    """Of a stream whose sessions do not all come back at once.

    Attributes:
        why: handles whose session does not come back now, until all that waits is done: a frame may name several.
        refused_seqs: of a session that is asleep, by handle: the first step that was refused and not sent again.
    """

    __slots__ = ("refused_seqs", "why")

    def __init__(self) -> None:
        self.why: dict[int, Fault] = {}
        self.refused_seqs: dict[int, int] = {}


class Seating:
    """Of one stream. Core thread only.

    Args:
        call: the stream.
        core: what drives the sessions.
        caller: whose sessions it reaches.
    """

    __slots__ = ("_away", "_call", "_core", "_waiting", "caller")

    def __init__(self, call: Call, core: Core, caller: Caller) -> None:
        self._call = call
        self._core = core
        self.caller = caller
        # Handles whose session is awaited, and what came for them meanwhile; None: nothing is awaited.
        self._waiting: Waiting | None = None
        # None: there is nothing to know of any.
        self._away: _Away | None = None

    @property
    def awaits(self) -> bool:
        """A session is awaited."""
        return self._waiting is not None

    def takes(self, request: session_pb2.StreamRequest) -> bool:
        """Keeps a request until the session that it is about has come; False: there is nothing to wait for."""
        waiting = self._waiting
        if waiting is None or not waiting.concerns(request):
            return False
        if waiting.full:
            for handle, seq in steps_of(request):
                self._call.refuse(handle, seq, _too_many(handle))
        else:
            waiting.add(request)
        return True

    def resume_token(self, grace_s: float) -> str:
        """What the stream's client is to show to the next server, when this one stops in so many seconds."""
        store = self._core.store
        if store is None or not store.store.shared:
            return ""
        return ResumeToken(store.policy.replica, self._core.wall(self._core.now()) + grace_s).text()

    def attach(self, message: session_pb2.AttachSession) -> None:
        """Attaches a session, once it is here."""
        handle = message.handle
        if handle in self._call.seats:
            text = f"handle {handle} is taken on this stream: choose another, or wait for its SessionDetached"
            self._call.refuse(handle, 0, Fault(e.ERROR_REASON_HANDLE_IN_USE, text, {"handle": str(handle)}))
            return
        self._await(handle)
        open_session(message, self._core, self.caller, lambda found: self._found(message, found))

    def _found(self, message: session_pb2.AttachSession, found: Found | Fault) -> None:
        """The session that an attach means is here, or it is known why not."""
        handle = message.handle
        if isinstance(found, Fault):
            self._call.refuse(handle, 0, found)
            self._go_on(handle)
            return
        try:
            attachment = self._core.directory.attach(
                found.session,
                self._call,
                handle,
                self._core.now(),
                max_epoch=message.max_epoch if found.resumed and not found.epoch else 0,
                number=self._call.number,
                epoch=found.epoch,
            )
        except Refused as refusal:
            self._call.refuse(handle, 0, refusal.fault)
            self._go_on(handle)
            return
        if self._call.is_broken:
            self._core.directory.abandon((attachment,), self._core.now())
            return
        # What happened to the session before must be told before: this stream may have held it under another handle.
        self._core.route()
        session = found.session
        self._call.attached(attachment)
        if session.durability == session_pb2.DURABILITY_SYNC:
            self._wait_for_store()
        info = session_info(session, self._core, self.caller)
        attached = session_pb2.SessionAttached(handle=handle, session=info, resumed=found.resumed)
        self._call.say(session_pb2.StreamResponse(attached=attached))
        if self._call.ending:
            # The client has half-closed, or the server stops: what came meanwhile is still done.
            self._go_on(handle)
            attachment.leave()
            self._core.directory.detach(attachment, self._core.now())
            self._core.kick()
            return
        self._go_on(handle)

    def _await(self, handle: int) -> None:
        """What comes for this handle waits until `_go_on`."""
        if self._waiting is None:
            self._waiting = Waiting()
        self._waiting.handles.add(handle)

    def _go_on(self, handle: int) -> None:
        """Does what came for a handle meanwhile."""
        waiting = self._waiting
        if waiting is None or self._call.is_broken:
            return
        free = waiting.arrived(handle)
        if not waiting.handles:
            self._waiting = None
        if free:
            for request in waiting.taken():
                self._call.request(request)
            self._core.kick()
        if self._waiting is None and self._away is not None:
            # Each may be asked for again.
            self._away.why.clear()
        self._call.expect_flush()

    def wakes(self, seats: Sequence[Attachment], request: session_pb2.StreamRequest) -> bool:
        """Has the sessions that are asleep woken, and the request done once they are back.

        False: there is nobody to wait for; of those that are asleep, `why_away` says why.
        """
        absent = () if self._away is None else self._away.why
        asleep = [seat for seat in seats if seat.session.asleep and seat.handle not in absent]
        store = self._core.store
        if not asleep or store is None:
            return False
        for seat in asleep:
            self._await(seat.handle)
        self.takes(request)
        for seat in asleep:
            store.restore(seat.session, partial(self._woken, seat))
        return True

    def _woken(self, seat: Attachment, opened: Session | Fault) -> None:
        """A session is back, or it is known why not."""
        handle = seat.handle
        if not self._call.is_broken and self._call.seats.get(handle) is seat:
            if isinstance(opened, Fault):
                # What waits for it is refused.
                self._aside.why[handle] = opened
            else:
                refused_seq = 0 if self._away is None else self._away.refused_seqs.pop(handle, 0)
                if refused_seq == opened.applied_seq + 1:
                    # Those that were sent behind it are aborted, until it is sent again.
                    opened.failed_seq = refused_seq
                self._call.moved(handle, opened)
        self._go_on(handle)

    def why_away(self, seat: Attachment, seq: int = 0) -> Fault:
        """Why the session of a handle that is asleep does not come back now, for whoever sent a step of it."""
        handle, away = seat.handle, self._aside
        if seq:
            away.refused_seqs[handle] = min(away.refused_seqs.get(handle, seq), seq)
        return away.why.get(handle) or store_away(seat.session.id, self._core.directory.limits.retry_s)

    def slept(self, handle: int, refused_seq: int) -> None:
        """A handle's session has fallen asleep; see Slept."""
        self.left(handle)
        if refused_seq:
            self._aside.refused_seqs[handle] = refused_seq

    def left(self, handle: int) -> None:
        """The handle is free."""
        if self._away is not None:
            self._away.refused_seqs.pop(handle, None)

    @property
    def _aside(self) -> "_Away":
        if self._away is None:
            self._away = _Away()
        return self._away

    def _wait_for_store(self) -> None:
        """From now on what is told to the client waits until the store has what it tells of."""
        if not isinstance(self._call.outlet, Held) and self._core.store is not None:
            self._call.outlet = self._core.store.keeper.hold(self._call.outlet)

    def flush(self, handle: int) -> None:
        """Says DurableSteps once the store has all that the session has applied."""
        seat = self._call.seat(handle)
        if isinstance(seat, Fault):
            self._call.refuse(handle, 0, seat)
            return
        session, store = seat.session, self._core.store
        if store is None or not session.stored:
            text = f"session {session.name!r} has durability none: there is no store to flush it to"
            metadata = {"session_id": session.name, "durability": "none", "most": "none"}
            self._call.refuse(handle, 0, Fault(e.ERROR_REASON_NOT_DURABLE, text, metadata))
            return

        def flushed(session: Session) -> None:
            if self._call.holds(seat) and session.stored:
                seqs = np.array([session.durable_seq], "<u8")
                durable = session_pb2.DurableSteps(handles=np.uint32(handle).tobytes(), seqs=seqs.tobytes())
                self._call.about(handle, session_pb2.StreamResponse(durable=durable))
                self._core.kick()

        store.keeper.flush(session, flushed)


def _too_many(handle: int) -> Fault:
    return Fault(
        e.ERROR_REASON_CREDIT_EXCEEDED,
        f"too much waits for the session of handle {handle}, which is on its way from the store: wait for an answer",
        {"max_in_flight": "0"},
    )
