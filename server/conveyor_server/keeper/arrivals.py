"""Sessions that come in: what the store answered becomes a session here, or a fault.

Invariants: a session comes in only where there is room for it, and only with the state that the store holds of it; what
this server held of one that somebody else has moved on ends before that comes in.
"""

from collections.abc import Callable

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import Refused
from conveyor_server.keeper.asks import Ask, Create, Fetch, Take, Wake
from conveyor_server.keeper.held import disown
from conveyor_server.keeper.revival import Revival
from conveyor_server.keeper.room import Room
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Closed
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Behind, Exists, Fenced, Missing, QuotaFull, Record

# How soon the store is asked again for a session that another server is about to write.
_AGAIN_S = 0.05


class _Cleared:
    """Waits for the end of what this server held of a session that somebody else has moved on."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def closed(self, _: Closed) -> None:
        """It is gone."""
        self._then()


class Arrivals:
    """Answers of the store to Openings' questions. Core thread only.

    Args:
        directory: the sessions.
        revival: makes sessions of records.
        room: finds room for them.
        ask: asks the store for what an answer leaves open.
    """

    def __init__(self, directory: Directory, revival: Revival, room: Room, ask: Callable[[Ask], None]) -> None:
        self._directory = directory
        self._revival = revival
        self._room = room
        self._ask = ask

    def created(self, create: Create, created: object, now: float) -> None:
        """What became of a new session: it is here, or there is one, or there are too many."""
        if isinstance(created, Exists):
            create.then(refusals.exists(create.session_id))
        elif isinstance(created, QuotaFull):
            create.then(_quota_full(created, self._directory.limits.retry_s))
        else:
            self._bring_in_new(create, now)

    def _bring_in_new(self, create: Create, now: float) -> None:
        directory = self._directory
        known = directory.sessions.get(create.session_id) or directory.asleep.get(create.session_id)

        def bring_in() -> None:
            # Its own row, whatever those whom others wake do.
            self._room.promised -= 1
            directory.opened += 1
            create.then(directory.bring_in(create.kept, now))

        self._room.promised += 1
        if known is None:
            bring_in()
        else:
            # It was closed elsewhere, or the store has lost it.
            disown(
                directory,
                known,
                refusals.lost(known),
                session_pb2.DETACH_CAUSE_CLOSED,
                now,
                reply_to=_Cleared(bring_in),
            )

    def claimed(self, take: Take, claimed: object, now: float) -> None:
        """What became of a session that was to be taken: it is here, or gone, or another's, or not written yet."""
        directory = self._directory
        known = directory.sessions.get(take.session_id)
        if isinstance(claimed, Behind):
            if now < take.until:
                take.not_before = now + _AGAIN_S
            else:
                # The server that had it has not written it, and never will: go on from what there is.
                take.min_seq = 0
            self._ask(take)
        elif isinstance(claimed, Fenced):
            if known is not None and known.stored and known.epoch < claimed.epoch:
                disown(directory, known, refusals.taken_over(known), session_pb2.DETACH_CAUSE_TAKEN_OVER, now)
            take.then(refusals.taken_over_at(take.session_id, claimed.epoch))
        elif isinstance(claimed, Missing):
            self._missing(take, known, now)
        elif isinstance(claimed, Record):
            if known is not None and known.stored and known.epoch == claimed.epoch - 1:
                known.epoch = claimed.epoch
                if known.attachment is not None:
                    # A stream of this server may have come to hold it since it was asked for, and holds it still.
                    known.attachment.epoch = claimed.epoch
                # It may have been asked to close meanwhile, and has more than the store until that is done.
                take.then(known if known.closing is None else refusals.closing(known))
            elif known is not None:
                # Somebody had it meanwhile: what is here of it counts no more.
                def again() -> None:
                    self._revive(take, claimed, now)

                disown(
                    directory,
                    known,
                    refusals.taken_over(known),
                    session_pb2.DETACH_CAUSE_TAKEN_OVER,
                    now,
                    reply_to=_Cleared(again),
                )
            else:
                self._revive(take, claimed, now)

    def _missing(self, take: Take, known: Session | None, now: float) -> None:
        if known is not None and known.stored:
            disown(self._directory, known, refusals.lost(known), session_pb2.DETACH_CAUSE_CLOSED, now)
        if take.missing is not None:
            take.missing()
            return
        take.then(self._directory.why_gone(take.session_id))

    def found(self, wake: Wake, found: object, now: float) -> None:
        """The state of a session that a stream here holds: it is here, or gone, or another's."""
        session, directory = wake.session, self._directory
        if directory.asleep.get(session.id) is not session:
            wake.then(session if not session.asleep else refusals.taken_over(session))
        elif isinstance(found, Record):
            self._revive(wake, found, now)
        elif isinstance(found, Fenced):
            why = refusals.taken_over(session)
            disown(directory, session, why, session_pb2.DETACH_CAUSE_TAKEN_OVER, now)
            wake.then(why)
        else:
            why = refusals.lost(session)
            disown(directory, session, why, session_pb2.DETACH_CAUSE_CLOSED, now)
            wake.then(why)

    def fetched(self, fetch: Fetch, found: object, now: float) -> None:
        """The state of a session that was taken without it."""
        if isinstance(found, Record):
            self._bring_in(fetch.take, found, now)
        elif isinstance(found, Fenced):
            fetch.then(refusals.taken_over_at(fetch.session_id, found.epoch))
        else:
            fetch.then(self._directory.why_gone(fetch.session_id))

    def _revive(self, ask: Take | Wake, record: Record, now: float) -> None:
        if isinstance(ask, Take) and not record.body:
            # It was here when it was asked for, and has left since.
            self._ask(Fetch(ask, record.epoch))
        else:
            self._bring_in(ask, record, now)

    def _bring_in(self, ask: Take | Wake, record: Record, now: float) -> None:
        if not self._room.is_free():
            # Others have come in meanwhile, or are about to.
            ask.then(refusals.full(self._directory.limits))
            return
        try:
            kept = self._revival.of(record, now)
        except Refused as refusal:
            ask.then(refusal.fault)
            return
        session = self._directory.bring_in(kept, now)
        head = self._revival.head(record)
        if (kept.engine.version, kept.engine.spec.digest) != (head.version, head.model_digest):
            self._directory.pause(session)
        ask.then(session)


def _quota_full(full: QuotaFull, retry_s: float) -> Fault:
    what, _, name = full.quota.key.partition(":")
    whose = f"all sessions of {what} {name!r}" if name else "all sessions that the store may hold"
    return Fault(
        e.ERROR_REASON_SESSIONS_EXHAUSTED,
        f"{whose} ({full.quota.most}) are taken: close some, wait until unused ones expire, or raise the quota",
        {"max_sessions": str(full.quota.most), "quota": full.quota.key},
        retry_s,
    )
