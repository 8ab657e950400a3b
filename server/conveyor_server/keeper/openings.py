"""What is asked of the store, for sessions that are to come in: created, taken from wherever they were, woken.

Invariants: whoever asks is answered once, with the session or with a fault; of one session there is one question in a
job; nothing is asked for that there is no room for.
"""

from collections import deque
from collections.abc import Callable

from conveyor_proto.reasons import Fault

from conveyor_server.errors import Refused
from conveyor_server.keeper import head
from conveyor_server.keeper.arrivals import Arrivals
from conveyor_server.keeper.asks import Ask, Create, Fetch, Peek, Take, Wake
from conveyor_server.keeper.job import Job
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.keeper.revival import Revival
from conveyor_server.keeper.room import Room
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Claim, Creation, Record

# Questions of one job.
_MOST = 1024
# How long a session that is to be taken may be asked for: after that, its client has gone elsewhere.
_LONGEST_S = 1.0


class Openings:
    """Questions that wait for a job. Core thread only.

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
        self._arrivals = Arrivals(directory, revival, room, self.ask)
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
            self._arrivals.created(create, created, now)
        self._room.reserved = 0
        for take, claimed in zip(takes, job.claimed or (), strict=False):
            self._arrivals.claimed(take, claimed, now)
        for load, found in zip(loads, job.found or (), strict=False):
            if isinstance(load, Peek):
                load.then(found if isinstance(found, Record) else None)
            elif isinstance(load, Fetch):
                self._arrivals.fetched(load, found, now)
            else:
                self._arrivals.found(load, found, now)
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
            policy.quotas(kept.engine.model, kept.options.tenant, kept.max_sessions),
            kept.epoch,
        )

    def _away(self, session_id: str, job: Job) -> Fault:
        return refusals.store_away(session_id, self._directory.limits.retry_s, str(job.error))
