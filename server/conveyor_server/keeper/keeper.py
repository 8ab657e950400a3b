"""Keeps the sessions of a server in its store: the core's side, which never waits.

Invariants: without I/O and without a clock: `begin` says what the store is to do next, somebody does it elsewhere,
`done` takes the answers. One job is out at a time. While the store is away nothing that was told is lost: sessions go
on as far as their durability allows, and what is due is tried again until the store has it.
"""

import logging
import math
from collections.abc import Callable

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.keeper.asks import Ask
from conveyor_server.keeper.held import Held, Outlet
from conveyor_server.keeper.job import Job
from conveyor_server.keeper.openings import Openings
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.keeper.revival import Revival
from conveyor_server.keeper.room import Room
from conveyor_server.keeper.writes import Writes
from conveyor_server.metrics import StoreFigures
from conveyor_server.repository import Repository
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import NEVER
from conveyor_server.store.contract import Outcome, Record

# While the store is away it is tried again after so long, doubled each time up to the second of these.
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.05, 0.25
_SWEEP_S = 30.0
_log = logging.getLogger("conveyor")


class Keeper:
    """See above. Core thread only. It is the directory's `keeping`.

    Args:
        directory: the sessions.
        repository: the models.
        policy: how sessions are kept.
        figures: what is counted.
        wall: unix seconds of a moment of the driver's clock.
        wake: has `begin` called soon.

    Attributes:
        away_since: when the store was first found away, in the driver's seconds; infinity: it is there.
    """

    def __init__(
        self,
        directory: Directory,
        repository: Repository[Engine],
        policy: KeeperPolicy,
        figures: StoreFigures,
        *,
        wall: Callable[[float], float],
        wake: Callable[[], None],
    ) -> None:
        self.policy = policy
        self.figures = figures
        self.away_since = math.inf
        self.why_away = ""
        self._directory = directory
        self._wake = wake
        self.writes = Writes(directory, policy, wall)
        self.room = Room(directory, policy.passivate_after_s, self.writes.force)
        self.revival = Revival(repository, policy.runtime, wall)
        self._openings = Openings(directory, policy, self.revival, self.room, wall)
        self._wall = wall
        self._held: dict[Held, None] = {}
        self._out: Job | None = None
        self._number = 0
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S
        self._sweep_at = 0.0
        self._stopped = False
        directory.keeping = self

    # ------------------------------------------------------------ asked

    def ask(self, ask: Ask) -> None:
        """Asks the store about a session; `then` is called once it has answered, or once it is known to be away."""
        if self.away_since < math.inf or self._stopped:
            ask.then(self.away(ask.session_id))
            return
        self._openings.ask(ask)
        self._wake()

    @property
    def retry_s(self) -> float:
        """Suggested delay while the store is away."""
        return self._directory.limits.retry_s

    def away(self, session_id: str) -> Fault:
        """The store does not answer, and the session waits for it."""
        return refusals.store_away(session_id, self._directory.limits.retry_s, self.why_away)

    def flush(self, session: Session, then: Callable[[Session], None]) -> None:
        """Calls back once all that the session has applied is in the store; or it is not this server's any more."""
        self.writes.flush(session, then)
        self._wake()

    def hold(self, outlet: Outlet) -> Held:
        """An outlet whose messages wait for the store."""
        return Held(outlet, self._waits)

    def _waits(self, held: Held) -> None:
        self._held[held] = None
        self._wake()

    # ------------------------------------------------------------ Keeping

    def may_leave(self, session: Session) -> bool:
        """See Keeping."""
        if self._stopped or self.writes.is_durable(session):
            return True
        self.writes.flush(session, self._directory.settle)
        self._wake()
        return False

    def may_close(self, session: Session) -> bool:
        """See Keeping."""
        if self._stopped:
            return True
        self.writes.end(session)
        self._wake()
        return False

    def may_go_on(self, session: Session) -> bool:
        """See Keeping."""
        self.writes.move(session)
        self._wake()
        return False

    # ------------------------------------------------------------ the store

    def begin(self, now: float) -> Job | None:
        """What the store is to do next; None: nothing now, see `next_at`."""
        if self._out is not None or now < self._retry_at:
            return None
        policy = self.policy
        if now >= self.writes.next_look_at() and self.away_since == math.inf:
            self.room.passivate_idle(now)
        self._number += 1
        job = Job(self._number, policy.replica, policy.runtime)
        whole = self.writes.add_to(job, now, sync=bool(self._held))
        if self.away_since == math.inf:
            self._openings.add_to(job, now)
        # While the store is away, nobody is let ask: somebody has to find out when it is back.
        if now >= self._sweep_at or self.away_since < math.inf:
            job.sweep = self._wall(now)
            self._sweep_at = now + _SWEEP_S
        if not job:
            self._release_all()
            return None
        for held in self._held if whole else ():
            held.mark(job.number)
        self._out = job
        return job

    def done(self, job: Job, now: float) -> None:
        """Takes a job back that was run; what it moved is told by the directory's events, and by who asked."""
        self._out = None
        self._count(job)
        self.writes.done(job, now)
        if job.error is None:
            self._is_there()
        else:
            self._is_away(str(job.error), now)
        if job.saved is not None or not job.saves:
            self._release(job.number)
        else:
            for held in self._held:
                held.unmark()
        self._openings.done(job, now)

    def look(self, now: float) -> None:
        """Has sessions stop that have gone on for long enough without the store."""
        if now - self.away_since >= self.policy.max_undurable_s:
            self._suspend(session_pb2.DURABILITY_ASYNC)
        if now - self.away_since >= self.policy.sync_patience_s:
            fault = self.away("")
            for held in list(self._held):
                held.refuse(fault)
            self._held.clear()

    def next_at(self, now: float) -> float:
        """`begin` and `look` have nothing to do before this moment."""
        at = min(self.writes.next_look_at(), self._sweep_at, self._openings.next_at(now))
        if self.writes.urgent or self._held:
            at = now
        if self.away_since < math.inf:
            limits = (self.policy.max_undurable_s, self.policy.sync_patience_s)
            ends = [self.away_since + limit for limit in limits if self.away_since + limit > now]
            at = min(max(at, self._retry_at), *ends, self._retry_at)
        return max(at, now)

    def refuse_waiting(self, why: str) -> None:
        """Tells everybody who waits to be let in that it takes too long."""
        self._openings.refuse_all(lambda session_id: refusals.store_away(session_id, self.retry_s, why))

    def write_all(self) -> None:
        """Writes all that the store does not have with the next job."""
        self.writes.force(session for session in self._directory.sessions.values() if session.stored)

    def stop(self) -> None:
        """Nothing is written any more: whoever waits for the store is told, and leaves without it."""
        self._stopped = True
        self._openings.refuse_all(self.away)
        self.writes.give_up()
        fault = self.away("")
        for held in list(self._held):
            held.refuse(fault)
        self._held.clear()

    # ------------------------------------------------------------ within

    def sample(self, now: float) -> None:
        """Brings up to date what of the figures is not counted but looked up."""
        figures = self.figures
        figures.away = int(self.away_since < math.inf)
        figures.undurable, figures.lag_s = self.writes.lag(now)
        figures.asleep = len(self._directory.asleep)
        figures.passivated = self.room.passivated

    def _count(self, job: Job) -> None:
        figures = self.figures
        figures.visit.observe(job.took_s)
        figures.swept += job.swept
        figures.failures += job.error is not None
        for answers in (job.claimed, job.found):
            figures.taken += sum(isinstance(answer, Record) for answer in answers or ())
        if job.saved is not None:
            figures.written += len(job.saved)
            figures.written_bytes += job.written_bytes
            figures.fenced += sum(outcome == Outcome.FENCED for outcome in job.saved)

    def _is_there(self) -> None:
        self._retry_at, self._retry_s = 0.0, _FIRST_RETRY_S
        if self.away_since < math.inf:
            self.away_since = math.inf
            self._suspend(NEVER)
            _log.info("the store answers again")

    def _is_away(self, why: str, now: float) -> None:
        self.why_away = why
        self._retry_at = now + self._retry_s
        self._retry_s = min(_LONGEST_RETRY_S, 2 * self._retry_s)
        if self.away_since == math.inf:
            self.away_since = now
            _log.warning("the store does not answer: %s", why)
            self._suspend(session_pb2.DURABILITY_SYNC)
            self._openings.refuse_all(self.away)
        self.look(now)

    def _suspend(self, durability: int) -> None:
        if self._directory.table.suspended_from != durability:
            self._directory.suspend(durability)

    def _release(self, job: int) -> None:
        for held in list(self._held):
            held.release(job)
            if not held:
                del self._held[held]

    def _release_all(self) -> None:
        for held in list(self._held):
            held.release_all()
        self._held.clear()
