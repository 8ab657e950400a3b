"""A runner in numpy and a driver without a clock: the core alone."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from conveyor_proto.fingerprint import fingerprint
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.runner.base import Run, RunFailed, RunResult
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer, Closed, Declined, Detached, Event, Landed
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Session, Submission
from staged import Staged


def sum_spec(*, timed: bool = False) -> spec_pb2.ModelSpec:
    """`total` after each time step of `x`, and the `last` unless `timed`; the state is the total, 10.0 when fresh."""
    spec = spec_pb2.ModelSpec(spec_version=1, name="sum", digest="d1", state_bytes=8)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    spec.outputs.add(name="total", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    if not timed:
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


class SumRunner(Staged):
    """Adds up. An input of POISON makes the whole run fail, OVERFLOW makes the row's new state infinite."""

    POISON = 666.0
    OVERFLOW = 1e308

    def __init__(self, capacity: int, *, timed: bool = False) -> None:
        self.spec = sum_spec(timed=timed)
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
            # One after the other, so that the bits are the same however the time steps are cut.
            totals = np.cumsum(np.concatenate([old[:, None, :], x], axis=1), axis=1)[:, 1:]
        last = totals[np.arange(len(x)), run.lengths - 1]
        last[np.abs(last) >= self.OVERFLOW] = np.inf
        self.slab[run.destinations] = last
        return RunResult([totals, last][: len(self.spec.outputs)], np.isfinite(last).all(axis=1))

    def read_rows(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.slab[list(slots)].copy()]

    def write_rows(self, slots: Sequence[int], states: Sequence[np.ndarray]) -> None:
        self.slab[list(slots)] = states[0]

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Item:
    """A step of an offer."""

    session: Session
    seq: int
    values: Sequence[float]
    tag: object
    holder: int
    epoch: int = 0
    acked_seq: int = 0


@dataclasses.dataclass(frozen=True)
class Told:
    """What somebody was told about a step: outputs as bytes, or a fault."""

    tag: object
    seq: int
    outputs: tuple[bytes, ...] = ()
    length: int = 0
    fault: Fault | None = None
    replayed: bool = False

    @property
    def reason(self) -> str:
        assert self.fault is not None, "the step was expected to be refused"
        return self.fault.reason_name

    @property
    def totals(self) -> list[float]:
        assert self.fault is None, self.fault
        return np.frombuffer(self.outputs[0], np.float64).tolist()


def next_seq(session: Session) -> int:
    """The seq after the last that was accepted, without looking at what is in the air."""
    table, row = session.table, session.row
    return int(table.applied_seq[row] + table.ahead[row]) + len(session.own_pending) + 1


@dataclasses.dataclass(eq=False)
class Tags:
    """The sink of an offer. What it is told comes through the events."""

    items: Sequence[Item]
    train: int

    def landed(self, members: np.ndarray, outputs: Sequence[np.ndarray]) -> None:
        raise AssertionError("the driver's part")

    def refused(self, members: np.ndarray, fault: Fault) -> None:
        raise AssertionError("the driver's part")

    def reply_to(self, member: int) -> object:
        return self.items[member * self.train].tag

    @property
    def kind(self) -> object:
        return Tags

    def joined(self, parts: Sequence[tuple["Tags", np.ndarray]]) -> "Tags":
        items = [
            item
            for tags, members in parts
            for member in members.tolist()
            for item in tags.items[member * self.train : (member + 1) * self.train]
        ]
        return Tags(items, self.train)


class Core:
    """Drives a directory and one engine by hand; `now` moves only when told."""

    def __init__(self, limits: SessionLimits, engine_limits: EngineLimits, *, timed: bool = False) -> None:
        self.now = 0.0
        self.directory = Directory(limits)
        self.runner = SumRunner(engine_limits.capacity(limits.max_sessions), timed=timed)
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
            fingerprint=fingerprint([array]),
            **fields,  # type: ignore[arg-type]
        )
        self.directory.submit(session, submission, self.now)
        return tag

    def offer(self, *items: Item, train: int = 1, acked: bool = False, timeout_s: float = math.inf) -> int:
        """Offers steps of one length, or of `train` steps of each session in a row; submits those that are left.

        Returns how many were left.
        """
        left = self.directory.offer(self.offer_of(*items, train=train, acked=acked, timeout_s=timeout_s), self.now)
        for member in left.tolist():
            for item in items[member * train : (member + 1) * train]:
                fields = {"epoch": item.epoch, "acked_seq": item.acked_seq if acked else 0, "timeout_s": timeout_s}
                self.send(item.session, item.seq, *item.values, reply_to=item.tag, **fields)
        return len(left)

    def offer_of(
        self, *items: Item, train: int = 1, acked: bool = False, timeout_s: float = math.inf, sliced: bool = True
    ) -> Offer:
        """The offer of such steps; where their rows lie side by side, as a slice if `sliced`."""
        first = items[::train]
        inputs = np.array([item.values for item in items], np.float64).reshape(len(first), -1, 1)
        rows = np.array([item.session.row for item in first])
        beside = sliced and (np.diff(rows) == 1).all()
        return Offer(
            engine=self.engine,
            record=first[0].session.record,
            rows=rows,
            where=slice(int(rows[0]), int(rows[0]) + len(rows)) if beside else rows,
            seqs=np.array([item.seq for item in first]),
            acked_seqs=np.array([item.acked_seq for item in first]) if acked else None,
            holders=np.array([item.holder for item in first]),
            prints=np.array(
                [[fingerprint([np.array(i.values, np.float64)[:, None]])] for i in items], np.uint64
            ).reshape(len(first), train),
            inputs=[inputs],
            length=inputs.shape[1],
            train=train,
            distinct=len(set(rows.tolist())) == len(rows),
            timeout_s=timeout_s,
            sink=Tags(items, train),
        )

    def items(self, sessions: Sequence[Session], *values: float, seq: int | None = None, skip: int = 0) -> list[Item]:
        """The next step of each session, by the stream that holds it."""
        return [
            Item(
                session,
                next_seq(session) + skip if seq is None else seq,
                values,
                next(self._tags),
                session.attachment.number,
                session.epoch,
            )
            for session in sessions
        ]

    def hold(self, session: Session) -> Session:
        """Gives the session to a new stream, whose steps may come as offers."""
        number = next(self._tags) + 1
        self.directory.attach(session, f"stream {number}", 1, self.now, number=number)
        return session

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

    def told(self, events: Sequence[Event] | None = None) -> list[tuple[str, object]]:
        """What the events since the last call say, in their order: (session id, what), of steps a Told."""
        said: list[tuple[str, object]] = []
        for event in self.directory.take_events() if events is None else events:
            if isinstance(event, Answer):
                outputs = tuple(array.tobytes() for array in event.outputs)
                told = Told(event.reply_to, event.seq, outputs, event.length, event.fault, event.replayed)
                said.append((event.session.id, told))
            elif isinstance(event, Landed):
                said += self._landed(event)
            elif isinstance(event, Declined):
                sink = event.offer.sink
                for member in event.members.tolist():
                    for item in sink.items[member * sink.train : (member + 1) * sink.train]:
                        said.append((item.session.id, Told(item.tag, item.seq, fault=event.fault)))
            elif isinstance(event, Detached):
                what = ("detached", event.attachment.number, event.cause, event.applied_seq)
                said.append((event.attachment.session.id, what))
            elif isinstance(event, Closed):
                said.append((str(event.reply_to), ("closed", event.applied_seq)))
        return said

    def steps_told(self) -> dict[tuple[object, int], Told]:
        """Settles, and returns what was said about each step, by tag and seq."""
        steps = [what for _, what in self.told(self.settle()) if isinstance(what, Told)]
        assert len({(told.tag, told.seq) for told in steps}) == len(steps), "a step was answered twice"
        return {(told.tag, told.seq): told for told in steps}

    @staticmethod
    def _landed(event: Landed) -> list[tuple[str, object]]:
        said: list[tuple[str, object]] = []
        sink = event.flight.offer.sink
        length = event.flight.offer.length // sink.train
        for place, member in enumerate(event.members.tolist()):
            own = [array[place] for array in event.outputs]
            for turn, item in enumerate(sink.items[member * sink.train : (member + 1) * sink.train]):
                part = own if sink.train == 1 else [array[turn : turn + 1] for array in own]
                outputs = tuple(array.tobytes() for array in part)
                said.append((item.session.id, Told(item.tag, item.seq, outputs, length)))
        return said

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
    def make(engine: EngineLimits | None = None, *, timed: bool = False, **limits: object) -> Core:
        engine = engine or EngineLimits(max_batch=4, quantum=4, max_batch_time_steps=16)
        return Core(SessionLimits(**limits), engine, timed=timed)  # type: ignore[arg-type]

    return make


@pytest.fixture
def core(make_core: Callable[..., Core]) -> Core:
    return make_core(max_sessions=64)
