"""Drives the core on an asyncio event loop: whatever arrived in one turn forms the next batch.

Invariants: the core belongs to the loop's thread; never two batches of one engine are out; a run that is long goes to
the engine's own thread, a short one runs here, because two thread crossings would cost more than it does.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.codec import Array
from google.protobuf.timestamp_pb2 import Timestamp

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.engine import Engine
from conveyor_server.engine.run_times import RunTimes
from conveyor_server.incidents import record
from conveyor_server.keeper.beat import Beat
from conveyor_server.metrics import Metrics
from conveyor_server.repository import Repository
from conveyor_server.runner.base import RunFailed, RunResult
from conveyor_server.servicers.core import Holder, ReplyTo
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer, Attachment, Declined, Detached, Event, Landed, Slept
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.session import Submission
from conveyor_server.tracing import Tracing
from conveyor_server.transport.lane import Lane
from conveyor_server.transport.step_traces import Moments, StepTraces

if TYPE_CHECKING:
    from conveyor_server.compiled import Turn

# Batches that a run at once may let go first: one of another length may have its turn before what it waits for.
_BEFORE = 2


class Driver:
    """The core's heart beat. Everything here runs on the loop's thread, but for `Engine.run`.

    Args:
        directory: all sessions.
        repository: all models; each engine of it is given to `add`.
        metrics: what is counted.
        inline_run_s: a batch that is expected to run at most this long runs on the loop's thread.
        max_time_steps: of one step.
        defer: calls back once what arrived in this turn is in; None: at the end of the loop's own turn.
        afterwards: calls back once what this turn has to send is on its way; None: at once.
    """

    def __init__(
        self,
        directory: Directory,
        repository: Repository[Engine],
        metrics: Metrics,
        *,
        inline_run_s: float,
        max_time_steps: int,
        defer: Callable[[Callable[[], None]], object] | None = None,
        afterwards: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self.directory = directory
        self.repository = repository
        self.metrics = metrics
        self.max_time_steps = max_time_steps
        # Set once, before anything arrives.
        self.store: Beat | None = None
        self._traces: StepTraces | None = None
        self.inline_run_s = inline_run_s
        self._loop = asyncio.get_running_loop()
        self._defer: Callable[[Callable[[], None]], object] = self._loop.call_soon if defer is None else defer
        self._afterwards = afterwards
        self._wall_offset_s = time.time() - self._loop.time()
        self._lanes: dict[Engine, Lane] = {}
        self._flushes: list[Callable[[], None]] = []
        self._gathers: list[Callable[[], bool]] = []
        # Runs at once that are answered and not counted yet.
        self._uncounted: list[Callable[[], None]] = []
        self._forgets: list[Callable[[Engine], None]] = []
        self._kicked = self.pressed = False
        # Events that are being handed out.
        self._routed: deque[Event] = deque()
        # Steps of this turn were run at once.
        self._ran = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        # Done when the core has broken an invariant of its own: nothing it says can be trusted any more.
        self.failed: asyncio.Future[str] = self._loop.create_future()

    def now(self) -> float:
        """Seconds of the driver's clock: the loop's, which never goes back."""
        return self._loop.time()

    @property
    def says_durable(self) -> bool:
        """See Core."""
        return self.store is not None

    @property
    def tracing(self) -> Tracing | None:
        """See Core."""
        return None if self._traces is None else self._traces.tracing

    def trace(self, tracing: Tracing) -> None:
        """Calls and steps are traced from now on. Before anything arrives."""
        self._traces = StepTraces(tracing, self.directory.table, self.now)

    def wall(self, at: float) -> float:
        """The unix seconds of a moment of the driver's clock."""
        return at + self._wall_offset_s

    def timestamp(self, at: float) -> Timestamp:
        """The wall-clock time of a moment of the driver's clock."""
        value = Timestamp()
        value.FromNanoseconds(round((at + self._wall_offset_s) * 1e9))
        return value

    def add(self, engine: Engine, step_s: Mapping[tuple[int, int], float]) -> None:
        """Runs an engine's steps from now on; `step_s`: seconds that a run of (rows, time steps) took."""
        engine.run_times = RunTimes(step_s)
        self._lanes[engine] = Lane(engine, self.metrics.of(engine))

    async def remove(self, engine: Engine) -> None:
        """Stops running an engine that takes part no more; returns once it has nothing left to run."""
        lane = self._lanes[engine]
        await lane.idle.wait()
        del self._lanes[engine]
        for forget in self._forgets:
            forget(engine)
        lane.thread.shutdown()

    def kick(self) -> None:
        """Runs what is ready at the end of this turn of the loop."""
        if not self._kicked:
            self._kicked = True
            self._defer(self._pump)

    def run_now(self, offer: Offer) -> bool:
        """See Core."""
        rows = len(offer.rows)
        if not self._can_run_now(offer.engine, rows, offer.length):
            return False
        began = self.now()
        outputs = self.directory.run_now(offer, began)
        if outputs is None:
            return False
        ran = self.now()
        offer.sink.landed(np.arange(rows), outputs)
        at = (began, ran, self.now())
        self._count(offer.engine, rows, offer.train, offer.length, at)
        if self._traces is not None and self._traces.offer_ran(offer, at):
            self._loop.call_soon(self._traces.tell)
        return True

    def run_one_now(self, seat: Attachment, step: Submission, reply: Callable[[Sequence[Array]], None]) -> bool:
        """See Core."""
        engine = seat.session.engine
        if not self._can_run_now(engine, 1, step.length):
            return False
        began = self.now()
        outputs = self.directory.run_one_now(seat, step, began)
        if outputs is None:
            return False
        ran = self.now()
        reply(outputs)
        at = (began, ran, self.now())
        self._count(engine, 1, 1, step.length, at)
        if self._traces is not None and self._traces.one_ran(seat, step.seq, step.length, at):
            self._loop.call_soon(self._traces.tell)
        return True

    def run_turn(self, turn: "Turn", tell: Callable[[list[bytes]], None]) -> bool:
        """See Core."""
        if turn.model is None:
            return False
        engine: Engine = turn.model.engine
        if not self._can_run_now(engine, turn.rows, 1):
            return False
        began = self.now()
        staging = self.directory.run_turn(turn, began)
        if staging is None:
            return False
        ran = self.now()
        tell(turn.answers(staging))
        at = (began, ran, self.now())
        self._uncounted.append(partial(self._count_turn, engine, turn.rows, at))
        if self._traces is not None and self._traces.turn_ran(turn, at):
            self._loop.call_soon(self._traces.tell)
        return True

    def _count_turn(self, engine: Engine, rows: int, at: Moments) -> None:
        engine.observe_run(rows)
        self._count(engine, rows, 1, 1, at)

    def _count(self, engine: Engine, rows: int, train: int, length: int, at: Moments) -> None:
        """Counts a run at once."""
        self._ran = True
        began, ran, told = at
        figures = self.metrics.of(engine)
        figures.ran(engine, rows, train=train, length=length, took_s=ran - began)
        figures.reply.observe(told - ran, rows * train)

    def _can_run_now(self, engine: Engine, rows: int, length: int) -> bool:
        lane = self._lanes.get(engine)
        # A stream may not have been told yet that a model is gone, and its sessions with it.
        if lane is None or engine.run_times.expected_s(rows, length) > self.inline_run_s:
            return False
        for _ in range(_BEFORE):
            # Left over from the last turn, or before something else that its stream sent in this one. Were it not run
            # first, what comes would fly behind it, and leave something over again, as long as there is much to do.
            if engine.waits(length):
                self._run_next(engine, lane)
        if not engine.fits(rows, length):
            return False
        # What happened to the sessions before is told before.
        self.route()
        return True

    def catch_up(self) -> None:
        """See Core."""
        if self.directory.has_events or self._routed:
            self.route()

    def route(self) -> None:
        """Hands out the events so far, then has each stream that was told something send it."""
        # Whoever is told may want what else has happened told first.
        routed = self._routed
        routed += self.directory.take_events()
        while routed:
            event = routed.popleft()
            if isinstance(event, Answer):
                if event.replayed:
                    self.metrics.of(event.session.engine).replayed += 1
                _reply_to(event.reply_to).answered(event)
            elif isinstance(event, Detached):
                _holder(event.attachment.owner).detached(event)
            elif isinstance(event, Slept):
                _holder(event.attachment.owner).slept(event)
            elif isinstance(event, Landed):
                event.flight.offer.sink.landed(event.members, event.outputs)
            elif isinstance(event, Declined):
                event.offer.sink.refused(event.members, event.fault)
            else:
                _reply_to(event.reply_to).closed(event)
        flushes, self._flushes = self._flushes, []
        for flush in flushes:
            flush()

    def after_routing(self, flush: Callable[[], None]) -> None:
        """Calls `flush` once, after the events at hand were handed out."""
        self._flushes.append(flush)

    def before_turns(self, gather: Callable[[], bool]) -> None:
        """Calls `gather` at the beginning of every turn from now on: it submits what arrived since the last.

        True: all of that is answered already, and nothing was submitted.
        """
        self._gathers.append(gather)

    def after_removal(self, forget: Callable[[Engine], None]) -> None:
        """Calls `forget` with every engine that takes part no more."""
        self._forgets.append(forget)

    async def stop(self, patience_s: float) -> bool:
        """Waits for what still runs and stops the timer and the threads; False: a run did not come back in time."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            async with asyncio.timeout(patience_s):
                for engine in list(self._lanes):
                    await self.remove(engine)
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------ within

    def _pump(self) -> None:
        self._kicked = False
        try:
            self.catch_up()
            answered = [gather() for gather in self._gathers]
            self.route()
            if not all(answered) or self._afterwards is None:
                self._end_turn()
                return
        except Exception as error:  # a defect: stop at once rather than serve what may be wrong
            self._fail(error)
            return
        # Nobody waits for the rest; and it is much that is cold.
        self._afterwards(self._end_turn_later)

    def _end_turn_later(self) -> None:
        try:
            self._end_turn()
        except Exception as error:  # as in _pump
            self._fail(error)

    def _end_turn(self) -> None:
        uncounted, self._uncounted = self._uncounted, []
        for count in uncounted:
            count()
        now = self.now()
        if now >= self.directory.next_expiry_at():
            self.directory.expire(now)
            self.route()
        ran, self._ran = self._ran, False
        pressed = False
        for engine, lane in self._lanes.items():
            lane.waived = ran and not lane.waived and engine.ready > 0 and not engine.busy
            if lane.waived:
                # What arrived during the turn was not in it, and would wait for this run and for the turn after it.
                self.kick()
            else:
                self._run_next(engine, lane)
            pressed = pressed or engine.ready > 0
        self.pressed = pressed
        self._watch()

    def _run_next(self, engine: Engine, lane: Lane) -> None:
        batch = engine.next_batch(self.now())
        if batch is None:
            return
        lane.idle.clear()
        if engine.run_times.expected_s(batch.rows, batch.longest) <= self.inline_run_s:
            self._deliver(engine, lane, batch, _run(engine, batch))
        else:
            lane.thread.submit(self._run_elsewhere, engine, lane, batch)

    def _run_elsewhere(self, engine: Engine, lane: Lane, batch: Batch) -> None:
        result = _run(engine, batch)
        self._loop.call_soon_threadsafe(self._back, engine, lane, batch, result)

    def _back(self, engine: Engine, lane: Lane, batch: Batch, result: RunResult | RunFailed) -> None:
        try:
            self._deliver(engine, lane, batch, result)
        except Exception as error:  # as in _pump
            self._fail(error)

    def _deliver(self, engine: Engine, lane: Lane, batch: Batch, result: RunResult | RunFailed) -> None:
        chosen = () if self._traces is None else self._traces.choose(batch)
        now = self.now()
        self.directory.deliver(engine, batch, result, now)
        steps = lane.figures.delivered(batch, now)
        self.route()
        told = self.now()
        lane.figures.reply.observe(told - now, steps)
        if chosen and self._traces is not None and self._traces.batch_ran(engine, chosen, batch, now, told):
            self._loop.call_soon(self._traces.tell)
        if engine.ready:
            # Not at once: what arrived during the run belongs in the next batch too.
            self.kick()
        else:
            lane.idle.set()
            if self.directory.take_moved():
                # Sessions have moved to another version of their model, and their next steps with them.
                self.kick()

    def _watch(self) -> None:
        """Wakes when the next session expires or step times out. A timer that is early finds nothing due."""
        at = self.directory.next_expiry_at()
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._wake)
            self._timer_at = at

    def _wake(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        self.kick()

    def fail(self, error: Exception) -> None:
        """The core has broken an invariant of its own: the server stops."""
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        incident = record("the core failed, the server stops", error)
        if not self.failed.done():
            self.failed.set_result(incident)


def _run(engine: Engine, batch: Batch) -> RunResult | RunFailed:
    try:
        return engine.run(batch)
    except Exception as error:  # whatever a model does, its batch fails and the server goes on
        return RunFailed(f"unexpectedly, see incident {record('a run failed', error)} in the server's log")


def _reply_to(reply_to: object) -> ReplyTo:
    return reply_to  # type: ignore[return-value]


def _holder(owner: object) -> Holder:
    return owner  # type: ignore[return-value]
