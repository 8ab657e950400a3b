"""How sessions come in: created, taken from wherever they were, woken.

Invariants: whoever asks is answered once, with the session or with a fault; of one session there is one question in a
job; a session is let in only where there is room for it, and only with the state that the store holds of it.
"""

import logging
from collections import deque
from collections.abc import Callable

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import Refused
from conveyor_server.keeper import head
from conveyor_server.keeper.asks import Ask, Create, Fetch, Peek, Take, Wake
from conveyor_server.keeper.held import disown
from conveyor_server.keeper.job import Job
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.keeper.revival import Revival
from conveyor_server.keeper.room import Room
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Closed
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Behind, Claim, Creation, Exists, Fenced, Missing, QuotaFull, Record

# Questions of one job, and how soon the store is asked again for a session that another server is about to write.
_MOST = 1024
_AGAIN_S = 0.05
# How long a session that is to be taken may be asked for: after that, its client has gone elsewhere.
_LONGEST_S = 1.0
_log = logging.getLogger("conveyor")


class _Cleared:
    """Waits for the end of what this server held of a session that somebody else has moved on."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def closed(self, _: Closed) -> None:
        """It is gone."""
        self._then()


class Openings:
    """Questions that wait for a job, and what becomes of their answers. Core thread only.

    Args:
        directory: the sessions.
        policy: what records are made with.
        revival: makes sessions of records.
        room: finds room for them.
        wall: unix seconds of a moment of the driver's clock.
    """

    def __init__(
        self,
        directory: Directory,
        policy: KeeperPolicy,
        revival: Revival,
        room: Room,
        wall: Callable[[float], float],
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._revival = revival
        self._room = room
        self._wall = wall
        self._waiting: deque[Ask] = deque()
        # Of the job that is out, in the order of its lists.
        self._creates: list[Create] = []
        self._takes: list[Take] = []
        self._loads: list[Wake | Fetch | Peek] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, ask: Ask) -> None:
        """Asks with the next job that has room for it."""
        self._waiting.append(ask)

    def next_at(self, now: float) -> float:
        """When the first question that waits can be asked; infinity: there is none."""
        return min((max(now, getattr(ask, "not_before", 0.0)) for ask in self._waiting), default=float("inf"))

    def add_to(self, job: Job, now: float) -> None:
        """Adds what can be asked now."""
        waiting, self._waiting = self._waiting, deque()
        asked: set[str] = set()
        self._creates, self._takes, self._loads = [], [], []
        for ask in waiting:
            session_id = ask.session_id
            if session_id in asked or len(asked) >= _MOST or getattr(ask, "not_before", 0.0) > now:
                self._waiting.append(ask)
                continue
            try:
                ready = self._ask(job, ask, now)
            except Refused as refusal:
                ask.then(refusal.fault)
                continue
            if ready:
                asked.add(session_id)
            else:
                self._waiting.append(ask)

    def done(self, job: Job, now: float) -> None:
        """Takes back a job that was run, as far as it was."""
        creates, takes, loads = self._creates, self._takes, self._loads
        self._creates, self._takes, self._loads = [], [], []
        for create, created in zip(creates, job.created or (), strict=False):
            self._room.reserved -= 1
            self._created(create, created, now)
        self._room.reserved = 0
        for take, claimed in zip(takes, job.claimed or (), strict=False):
            self._claimed(take, claimed, now)
        for load, found in zip(loads, job.found or (), strict=False):
            if isinstance(load, Peek):
                load.then(found if isinstance(found, Record) else None)
            elif isinstance(load, Fetch):
                self._fetched(load, found, now)
            else:
                self._found(load, found, now)
        undone: list[Ask] = []
        undone += creates if job.created is None else []
        undone += takes if job.claimed is None else []
        undone += loads if job.found is None else []
        for ask in undone:
            ask.then(self._away(ask.session_id, job))

    def refuse_all(self, why: Callable[[str], Fault]) -> None:
        """Tells everybody who waits why there is no answer."""
        waiting, self._waiting = self._waiting, deque()
        for ask in waiting:
            ask.then(why(ask.session_id))

    # ------------------------------------------------------------ asking

    def _ask(self, job: Job, ask: Ask, now: float) -> bool:
        """Adds a question to a job; False: it has to wait.

        Raises:
            Refused: there is no room, and none is to be expected; or it is too late for it.
        """
        if isinstance(ask, Peek):
            job.wanted.append((ask.session_id, 0))
            self._loads.append(ask)
            return True
        known = self._directory.sessions.get(ask.session_id)
        if known is not None and known.closing is not None:
            # What was here of it is on its way out.
            return False
        if isinstance(ask, Create):
            return self._ask_for_new(job, ask, known, now)
        if isinstance(ask, Take):
            return self._ask_to_take(job, ask, known, now)
        return self._ask_for_state(job, ask, now)

    def _ask_for_state(self, job: Job, ask: Wake | Fetch, now: float) -> bool:
        if isinstance(ask, Wake) and self._directory.asleep.get(ask.session_id) is not ask.session:
            # It has left, or came back by itself.
            ask.then(ask.session if not ask.session.asleep else refusals.taken_over(ask.session))
            return True
        if not self._room.reserve(now):
            return False
        job.wanted.append((ask.session_id, ask.session.epoch if isinstance(ask, Wake) else ask.epoch))
        self._loads.append(ask)
        return True

    def _ask_for_new(self, job: Job, ask: Create, known: Session | None, now: float) -> bool:
        if known is not None and not known.stored:
            raise Refused(refusals.exists(ask.session_id))
        if not self._room.reserve(now):
            return False
        job.creations.append(self._creation(ask, now))
        self._creates.append(ask)
        return True

    def _ask_to_take(self, job: Job, ask: Take, known: Session | None, now: float) -> bool:
        policy = self._policy
        if now - max(ask.asked_at, ask.until) > _LONGEST_S:
            # This process stood still: whoever asked is elsewhere by now, and would lose the session to nobody.
            retry_s = self._directory.limits.retry_s
            raise Refused(refusals.store_away(ask.session_id, retry_s, "it was asked too long ago"))
        if known is None and not self._room.reserve(now):
            return False
        claim = Claim(
            ask.session_id,
            policy.replica,
            policy.runtime,
            self._wall(now) + policy.ttl_s,
            max_epoch=ask.max_epoch,
            known_epoch=known.epoch if known is not None and known.stored else 0,
            min_seq=ask.min_seq,
            not_after=now + _LONGEST_S,
        )
        job.claims.append(claim)
        self._takes.append(ask)
        return True

    def _creation(self, create: Create, now: float) -> Creation:
        kept, policy = create.kept, self._policy
        wall = self._wall(now)
        return Creation(
            kept.session_id,
            kept.engine.model,
            head.encode(kept.session_id, kept.engine, kept.options, wall),
            self._revival.first_body(kept, wall),
            kept.applied_seq,
            policy.replica,
            policy.runtime,
            wall + kept.options.idle_timeout_s,
            policy.quotas(kept.engine.model, kept.options.tenant),
            kept.epoch,
        )

    # ------------------------------------------------------------ answers

    def _created(self, create: Create, created: object, now: float) -> None:
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

    def _claimed(self, take: Take, claimed: object, now: float) -> None:
        directory = self._directory
        known = directory.sessions.get(take.session_id)
        if isinstance(claimed, Behind):
            if now < take.until:
                take.not_before = now + _AGAIN_S
            else:
                # The server that had it has not written it, and never will: go on from what there is.
                take.min_seq = 0
            self._waiting.append(take)
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

    def _found(self, wake: Wake, found: object, now: float) -> None:
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

    def _fetched(self, fetch: Fetch, found: object, now: float) -> None:
        if isinstance(found, Record):
            self._bring_in(fetch.take, found, now)
        elif isinstance(found, Fenced):
            fetch.then(refusals.taken_over_at(fetch.session_id, found.epoch))
        else:
            fetch.then(self._directory.why_gone(fetch.session_id))

    def _revive(self, ask: Take | Wake, record: Record, now: float) -> None:
        if isinstance(ask, Take) and not record.body:
            # It was here when it was asked for, and has left since.
            self._waiting.append(Fetch(ask, record.epoch))
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
        if kept.engine.version != self._revival.head(record).version:
            self._directory.pause(session)
        ask.then(session)

    def _away(self, session_id: str, job: Job) -> Fault:
        return refusals.store_away(session_id, self._directory.limits.retry_s, str(job.error))


def _quota_full(full: QuotaFull, retry_s: float) -> Fault:
    what, _, name = full.quota.key.partition(":")
    whose = f"all sessions of {what} {name!r}" if name else "all sessions that the store may hold"
    return Fault(
        e.ERROR_REASON_SESSIONS_EXHAUSTED,
        f"{whose} ({full.quota.most}) are taken: close some, wait until unused ones expire, or raise the quota",
        {"max_sessions": str(full.quota.most), "quota": full.quota.key},
        retry_s,
    )
