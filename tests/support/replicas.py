"""Servers of one store without sockets, threads or a clock: whoever uses them says what happens when.

Invariant: all of a replica but its transport and its thread pools is the server's own: streams, unary calls, driver,
directory, keeper. A replica moves only in `turn`; what it gives to a thread happens in `visit` and `run`, and what is
not back by its crash never comes.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server import compiled
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.keeper.beat import Beat
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.metrics import Metrics
from conveyor_server.runner.base import Run, RunResult
from conveyor_server.servicers.session import SessionServicer
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.store.contract import Created, Creation, StateStore
from conveyor_server.transport.intake import Intake
from conveyor_server.transport.loop import Driver
from conveyor_server.transport.stream import StreamCall
from flaky_store import FlakyStore
from staged import Staged

FRESH = 10.0
MODEL = "sum"
# More turns of a loop than anything takes that does not go on for ever.
_MANY_TURNS = 100
_VISIT_S = 0.0001
_names = itertools.count(1)


class Clock:
    """Unix seconds, and the seconds of every loop."""

    def __init__(self) -> None:
        self.now = 1e9


class Births:
    """A store that knows what was created in it.

    Attributes:
        first_epochs: of the sessions of each name, one after the other.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self.name = store.name
        self.first_epochs: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """See StateStore."""
        answers = self._store.create(creations)
        for new, answer in zip(creations, answers, strict=True):
            if answer is None:
                self.first_epochs.setdefault(new.session_id, []).append(new.epoch)
        return answers


class HandLoop(asyncio.BaseEventLoop):
    """An event loop that waits for nothing: its time is a Clock's."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._selector = SimpleNamespace(select=lambda timeout: ())

    def time(self) -> float:
        return self._clock.now

    def turn(self) -> None:
        """Does what is due, and what comes of it."""
        for _ in range(_MANY_TURNS):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:
                return
        raise AssertionError("the loop does not come to rest")

    def _process_events(self, events: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""


class Hands:
    """A thread pool whose work is done by hand, the oldest first."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], object]] = deque()

    def __len__(self) -> int:
        return len(self._work)

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        self._work.append(lambda: work(*arguments))

    def shutdown(self, **_: object) -> None:
        self._work.clear()

    def do(self) -> None:
        self._work.popleft()()


class SumRunner(Staged):
    """`total` after each time step of `x`; the state is the total, FRESH at first."""

    device = "cpu"

    def __init__(self, capacity: int) -> None:
        self.spec = spec_pb2.ModelSpec(spec_version=1, name=MODEL, digest="d1", state_bytes=8)
        float64 = tensor_pb2.DATA_TYPE_FLOAT64
        self.spec.inputs.add(name="x", dtype=float64, shape=[1], has_time=True)
        self.spec.outputs.add(name="total", dtype=float64, shape=[1], has_time=True)
        initial = np.array([FRESH]).tobytes()
        self.spec.states.add(name="sum", input_name="s", output_name="s2", dtype=float64, shape=[1], initial=initial)
        self.capacity = capacity
        self.slab = np.full((capacity, 1), np.nan)

    def step(self, run: Run) -> RunResult:
        old = np.where(run.fresh[:, None], FRESH, self.slab[run.sources])
        totals = old[:, None, :] + np.cumsum(run.inputs[0], axis=1)
        last = totals[np.arange(len(totals)), run.lengths - 1]
        self.slab[run.destinations] = last
        return RunResult([totals], np.isfinite(last).all(axis=1))

    def read_rows(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.slab[list(slots)].copy()]

    def write_rows(self, slots: Sequence[int], states: Sequence[np.ndarray]) -> None:
        self.slab[list(slots)] = states[0]

    def close(self) -> None:
        """It holds nothing."""


class Sink:
    """Where a stream's messages go."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def put(self, message: bytes) -> None:
        self.messages.append(message)

    def close(self, status: object = None) -> None:
        """Whoever reads it knows."""

    def fail(self, status: object) -> None:
        raise AssertionError(f"a stream failed: {status}")


class Replica:
    """A server process, as it starts.

    Args:
        clock: its time.
        inner: the store that all share.
        at_once: steps run in their turn, on the core thread; else on the engine's.
        max_sessions: that it has in memory at once.
        hasty: answers leave before the store has what they tell of, which is wrong.
    """

    def __init__(
        self, clock: Clock, inner: StateStore, *, at_once: bool = False, max_sessions: int = 8, hasty: bool = False
    ) -> None:
        self.store = FlakyStore(inner)
        self._clock = clock
        self.store_thread, self.engine_thread = Hands(), Hands()
        self.loop = HandLoop(clock)
        self._at_once = at_once
        self._limits = SessionLimits(max_sessions=max_sessions)
        # A crash is the end of all that the process was, and nobody waits for its calls any more.
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop.run_until_complete(self._start())
        if hasty:
            self.beat.keeper.hold = lambda outlet: outlet
            self.beat.keeper.flush = lambda session, then: then(session)

    async def _start(self) -> None:
        limits = EngineLimits(max_batch=4, quantum=4, max_batch_time_steps=16)
        runner = SumRunner(limits.capacity(self._limits.max_sessions))
        engine = Engine(runner, model=MODEL, version="1", limits=limits)
        item = SimpleNamespace(name=MODEL, version="1", engine=engine, serving=engine)
        repository: Any = SimpleNamespace(find=lambda name, version="", uses=None: item, versions=lambda: [item])
        self.metrics = Metrics()
        self.directory = Directory(self._limits)
        inline_run_s = 1.0 if self._at_once else -1.0
        self.driver = driver = Driver(
            self.directory, repository, self.metrics, inline_run_s=inline_run_s, max_time_steps=8
        )
        # The clock is the wall's: what is written is the same whenever it is.
        driver._wall_offset_s = 0.0
        policy = KeeperPolicy(f"replica {next(_names)}", "a runtime", passivate_after_s=2.5)
        self.beat = driver.store = Beat(
            self.store,
            self.directory,
            repository,
            policy,
            self.metrics,
            wall=driver.wall,
            kick=driver.kick,
            fail=driver.fail,
        )
        driver.add(engine, {(1, 1): 1e-6})
        self.beat._thread = self.store_thread
        driver._lanes[engine].thread = self.engine_thread
        self.intake = Intake(driver, self.metrics, use_compiled=compiled.BUILT)
        driver.before_turns(self.intake.take)
        self.unary = SessionServicer(driver)

    def stream(self) -> tuple[StreamCall, Sink]:
        """A new stream, and where its messages go."""
        sink = Sink()
        call = StreamCall(self.driver, sink, self.metrics, self.intake)
        return call, sink

    def call(self, what: Coroutine[Any, Any, None]) -> None:
        """Begins a unary call with the next turn."""
        task = self.loop.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def waits(self) -> bool:
        """A unary call is not answered."""
        return bool(self._tasks)

    def turn(self) -> None:
        """The core thread does what there is for it to do."""
        self.loop.turn()
        if self.driver.failed.done():
            raise AssertionError(self.driver.failed.result())

    def visit(self, trouble: str = "") -> None:
        """The store's thread does its job; `away`: it could not; `mute`: it did, and was not told so."""
        # It takes a moment, and no two sessions of a name begin at the same.
        self._clock.now += _VISIT_S
        self.store.away, self.store.mute = trouble == "away", trouble == "mute"
        self.store_thread.do()

    def run(self) -> None:
        """The engine's thread does its run."""
        self.engine_thread.do()

    def crash(self) -> None:
        """It is no more."""
        self.store_thread.shutdown()
        self.engine_thread.shutdown()
        for task in self._tasks:
            task.cancel()
        self.loop.turn()
        self.loop.close()
