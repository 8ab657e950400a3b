"""A runner in numpy and a driver without a clock: the core alone."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.runner.base import Run, RunFailed, RunResult
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer, Event
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Session, Submission


def sum_spec() -> spec_pb2.ModelSpec:
    """`total` after each time step of `x`; the state is the total, 10.0 when fresh."""
    spec = spec_pb2.ModelSpec(spec_version=1, name="sum", digest="d1", state_bytes=8)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    spec.outputs.add(name="total", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    spec.outputs.add(name="last", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1])
    spec.states.add(
        name="sum",
        input_name="s",
        output_name="s2",
        dtype=tensor_pb2.DATA_TYPE_FLOAT64,
        shape=[1],
        initial=np.array([10.0]).tobytes(),
    )
    return spec


class SumRunner:
    """Adds up. An input of POISON makes the whole run fail, OVERFLOW makes the row's new state infinite."""

    POISON = 666.0
    OVERFLOW = 1e308

    def __init__(self, capacity: int) -> None:
        self.spec = sum_spec()
        self.device = "cpu"
        self.capacity = capacity
        self.slab = np.full((capacity, 1), np.nan)
        self.runs: list[Run] = []
        self.broken = False

    def step(self, run: Run) -> RunResult:
        assert len(run.sources) > 0
        assert len(set(run.destinations.tolist())) == len(run.destinations)
        assert not set(run.destinations.tolist()) & set(run.sources[~run.fresh].tolist())
        self.runs.append(run)
        x = run.inputs[0]
        assert x.shape[:2] == (len(run.lengths), run.lengths.max())
        if self.broken or (x == self.POISON).any():
            self.slab[run.destinations] = -1e9
            raise RunFailed("no")
        old = np.where(run.fresh[:, None], 10.0, self.slab[run.sources])
        with np.errstate(over="ignore"):
            totals = old[:, None, :] + np.cumsum(x, axis=1)
        last = totals[np.arange(len(x)), run.lengths - 1]
        last[np.abs(last) >= self.OVERFLOW] = np.inf
        self.slab[run.destinations] = last
        return RunResult([totals, last], np.isfinite(last).all(axis=1))

    def read_rows(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.slab[list(slots)].copy()]

    def write_rows(self, slots: Sequence[int], states: Sequence[np.ndarray]) -> None:
        self.slab[list(slots)] = states[0]

    def close(self) -> None:
        pass


class Core:
    """Drives a directory and one engine by hand; `now` moves only when told."""

    def __init__(self, limits: SessionLimits, engine_limits: EngineLimits) -> None:
        self.now = 0.0
        self.directory = Directory(limits)
        self.runner = SumRunner(engine_limits.capacity(limits.max_sessions))
        self.engine = Engine(self.runner, model="sum", version="1", limits=engine_limits)
        self._tags = itertools.count()

    def create(self, session_id: str = "", **options: float) -> Session:
        return self.directory.create(self.engine, self.now, session_id=session_id, **options)  # type: ignore[arg-type]

    def send(self, session: Session, seq: int, *values: float, reply_to: object = None, **fields: object) -> object:
        """Submits a step of the values' time steps and returns its reply_to."""
        tag = next(self._tags) if reply_to is None else reply_to
        array = np.array(values, np.float64)[:, None]
        submission = Submission(
            seq,
            tag,
            inputs=[array],
            length=len(values),
            fingerprint=hash(values) % 2**64,
            **fields,  # type: ignore[arg-type]
        )
        self.directory.submit(session, submission, self.now)
        return tag

    def run_one(self) -> int:
        """Runs one batch and delivers it; rows of the batch, 0 when nothing was ready."""
        batch = self.engine.next_batch(self.now)
        if batch is None:
            return 0
        self.directory.deliver(self.engine, batch, self.engine.run(batch), self.now)
        return batch.rows

    def settle(self) -> list[Event]:
        """Runs until nothing is ready and returns all events."""
        while self.run_one():
            pass
        return self.directory.take_events()

    def answers(self) -> dict[object, Answer]:
        """Settles, and returns the answers by reply_to."""
        events = self.settle()
        return {event.reply_to: event for event in events if isinstance(event, Answer)}

    def step(self, session: Session, *values: float) -> list[float]:
        """Sends the next step and returns its totals."""
        tag = self.send(session, session.accepted_seq + 1, *values)
        answer = self.answers()[tag]
        assert answer.fault is None, answer.fault
        return [float(value) for value in answer.outputs[0][:, 0]]

    def check_slots(self) -> None:
        """The idle engine's slots are exactly those that sessions hold."""
        held = [s.lane.slot for s in self.directory.sessions.values() if s.lane.slot is not None]
        self.engine.slots.check(held)
        assert self.engine.backlog.time_steps == 0
        assert self.engine.ready == 0


@pytest.fixture
def make_core() -> Callable[..., Core]:
    def make(engine: EngineLimits | None = None, **limits: object) -> Core:
        engine = engine or EngineLimits(max_batch=4, quantum=4, max_batch_time_steps=16)
        return Core(SessionLimits(**limits), engine)  # type: ignore[arg-type]

    return make


@pytest.fixture
def core(make_core: Callable[..., Core]) -> Core:
    return make_core(max_sessions=64)
