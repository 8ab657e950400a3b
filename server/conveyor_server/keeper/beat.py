"""The keeper's heart beat: jobs go to the store's thread and come back to the core's.

Invariant: one thread ever speaks to the store, and the core thread never waits for it.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.keeper.asks import Create, Peek, Take, Then, Wake
from conveyor_server.keeper.job import Job
from conveyor_server.keeper.keeper import Keeper
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.metrics import Metrics, StoreFigures
from conveyor_server.repository import Repository
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.keeping import Kept
from conveyor_server.sessions.refusals import lost, store_away, taken_over
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Record, StateStore, StoreUnavailable

R = TypeVar("R")
_log = logging.getLogger("conveyor")
# Between the end of one look and the next, where something is wanted that cannot be had yet.
_LEAST_S = 0.001
# A process that has done nothing for so long stood still (it was stopped, or its machine was), and is slow of hearing
# for a moment when it goes on.
_STILL_S, _DEAF_S = 1.0, 0.5


class Beat:
    """Runs a keeper's jobs. Made and used on the event loop of the core thread.

    Args:
        store: where sessions are kept.
        directory, repository, policy: see Keeper.
        metrics: gets the store's figures.
        wall: unix seconds of a moment of the loop's clock.
        kick: has what happened to sessions told, and ready steps run.
        fail: called with a defect of the keeper's own: the server stops.
    """

    def __init__(
        self,
        store: StateStore,
        directory: Directory,
        repository: Repository[Engine],
        policy: KeeperPolicy,
        metrics: Metrics,
        *,
        wall: Callable[[float], float],
        kick: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self.store = store
        self._loop = asyncio.get_running_loop()
        figures = metrics.store = StoreFigures()
        self.keeper = Keeper(directory, repository, policy, figures, wall=wall, wake=self.wake)
        metrics.sample_store = lambda: self.keeper.sample(self._loop.time())
        self._kick = kick
        self._fail = fail
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._woken = False
        self._busy = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._seen_at = self._loop.time()
        self._deaf_until = 0.0
        self._look_at_clock()

    @property
    def policy(self) -> KeeperPolicy:
        """How sessions are kept."""
        return self.keeper.policy

    def create(self, kept: Kept, then: Then) -> None:
        """Adds a new session to the store, and brings it in."""
        self.keeper.ask(Create(kept, then))

    def take(
        self,
        session_id: str,
        then: Then,
        *,
        max_epoch: int = 0,
        min_seq: int = 0,
        wait_s: float = 0.0,
        missing: Callable[[], None] | None = None,
    ) -> None:
        """Brings a session in, wherever it was; its epoch rises. See asks.Take."""
        now = self._now()
        if now < self._deaf_until:
            then(store_away(session_id, self.keeper.retry_s, "this server stood still"))
            return
        self.keeper.ask(Take(session_id, max_epoch, min_seq if wait_s else 0, now + wait_s, then, missing, now))

    def restore(self, session: Session, then: Then) -> None:
        """Brings a session back that is asleep."""
        self.keeper.ask(Wake(session, then))

    def peek(self, session_id: str, then: Callable[[Record | Fault | None], None]) -> None:
        """Looks at what the store has of a session."""
        self.keeper.ask(Peek(session_id, then))

    def when_durable(self, session: Session, then: Callable[[Fault | None], None]) -> None:
        """Calls back once the store has all that the session has applied, or after sync_patience_s with why it has not.

        A fault is STORE_UNAVAILABLE, SESSION_TAKEN_OVER, or SESSION_CLOSED where the store has it no longer.
        """
        told = False

        def tell(fault: Fault | None) -> None:
            nonlocal told
            if not told:
                told = True
                timer.cancel()
                then(fault)
                self._kick()

        def written(session: Session) -> None:
            if session.stored:
                tell(None if self.keeper.writes.is_durable(session, seq) else self.keeper.away(session.id))
            else:
                taken = session.closing == session_pb2.DETACH_CAUSE_TAKEN_OVER
                tell(taken_over(session) if taken else lost(session))

        seq = session.applied_seq

        timer = self._loop.call_later(self.policy.sync_patience_s, lambda: tell(self.keeper.away(session.id)))
        self.keeper.flush(session, written)

    async def call(self, what: Callable[[], R]) -> R:
        """Runs something that asks the store, on its thread.

        Raises:
            Refused: STORE_UNAVAILABLE.
        """
        try:
            return await self._loop.run_in_executor(self._thread, what)
        except StoreUnavailable as error:
            raise Refused(store_away("", self.keeper.retry_s, str(error))) from error

    def wake(self) -> None:
        """Looks for something to do once what happens now is over."""
        if not self._woken and not self._busy:
            self._woken = True
            self._loop.call_soon(self._turn)

    async def stop(self, patience_s: float) -> bool:
        """Writes what is not written yet and lets go of the store. False: it did not come back in time."""
        in_time = True
        try:
            async with asyncio.timeout(patience_s):
                while self.keeper.writes.undurable and self.keeper.away_since == math.inf:
                    self.keeper.write_all()
                    self._turn()
                    if not self._busy:
                        break
                    await self._idle.wait()
                await self._idle.wait()
        except TimeoutError:
            in_time = False
        if self.keeper.writes.undurable:
            _log.warning(
                "%d sessions have steps that the store does not have: their clients have to send them again",
                self.keeper.writes.undurable,
            )
        self.keeper.stop()
        if self._timer is not None:
            self._timer.cancel()
        self._clock.cancel()
        self._thread.shutdown(wait=False)
        if in_time:
            await asyncio.to_thread(self.store.close)
        return in_time

    # ------------------------------------------------------------ within

    def _look_at_clock(self) -> None:
        """Now and then, so that it shows when this process stood still."""
        self._now()
        self._clock = self._loop.call_later(_STILL_S / 4, self._look_at_clock)

    def _now(self) -> float:
        """The loop's time. Where nobody has asked for it for long, this process stood still.

        What came before that, and what has waited in its sockets since, was asked by clients that have gone elsewhere:
        were they let in, whoever they are with now would be fenced, for nobody.
        """
        now = self._loop.time()
        if now - self._seen_at > _STILL_S:
            _log.warning("this server stood still for %.1f s", now - self._seen_at)
            self._deaf_until = now + _DEAF_S
            self.keeper.refuse_waiting("this server stood still")
        self._seen_at = now
        return now

    def _turn(self) -> None:
        self._woken = False
        try:
            self._begin()
        except Exception as error:  # a defect: what the keeper says cannot be trusted any more
            self._fail(error)

    def _begin(self) -> None:
        if self._busy:
            return
        now = self._now()
        if self.keeper.away_since < math.inf:
            self.keeper.look(now)
        job = self.keeper.begin(now)
        if job is None:
            self._watch(now)
            # Somebody may have been let go, or refused.
            self._kick()
            return
        self._busy = True
        self._idle.clear()
        self._thread.submit(self._run, job)

    def _run(self, job: Job) -> None:
        job.run(self.store)
        self._loop.call_soon_threadsafe(self._back, job)

    def _back(self, job: Job) -> None:
        self._busy = False
        self._idle.set()
        try:
            self.keeper.done(job, self._now())
            self._kick()
            self._begin()
        except Exception as error:  # as in _turn
            self._fail(error)

    def _watch(self, now: float) -> None:
        at = max(self.keeper.next_at(now), now + _LEAST_S)
        if self._timer is not None:
            if self._timer_at <= at and self._timer_at > now:
                return
            self._timer.cancel()
        if at < math.inf:
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._due)

    def _due(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        self._turn()
