"""What is counted.

Invariant: the hot path only adds to plain numbers that belong to the core thread; a scrape copies them there (`sample`)
and renders the copy elsewhere (exposition).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from google.rpc import error_details_pb2, status_pb2

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.engine import Engine
from conveyor_server.sessions.directory import Directory

LATENCY_BUCKETS_S = (
    *(50e-6, 100e-6, 200e-6, 500e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3),
    *(1.0, 2.0, 5.0, 10.0),
)
BATCH_BUCKETS = tuple(float(1 << power) for power in range(11))
SHARE_BUCKETS = tuple(step / 10 for step in range(1, 11))


class Tally:
    """A histogram's numbers. Adding one value costs a bisection; adding it many times costs no more."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        # The last is for what exceeds every bound.
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bound and how many values are at most that, as Prometheus counts."""
        rows: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows


@dataclass(slots=True)
class ModelFigures:
    """What is counted for one model version; outlives an unload, so that counters never fall. Core thread only."""

    model: str
    version: str
    steps: int = 0
    time_steps: int = 0
    replayed: int = 0
    ready: int = 0
    failed: int = 0
    load_s: float = 0.0
    sessions: int = 0
    resident_bytes: int = 0
    slab_bytes: int = 0
    queued: int = 0
    # By rows: how many runs, and their seconds together.
    runs_by_rows: dict[int, tuple[int, float]] = field(default_factory=dict)
    batch_rows: Tally = field(default_factory=lambda: Tally(BATCH_BUCKETS))
    batch_share: Tally = field(default_factory=lambda: Tally(SHARE_BUCKETS))
    batch_run: Tally = field(default_factory=lambda: Tally(LATENCY_BUCKETS_S))
    queue: Tally = field(default_factory=lambda: Tally(LATENCY_BUCKETS_S))
    run: Tally = field(default_factory=lambda: Tally(LATENCY_BUCKETS_S))
    reply: Tally = field(default_factory=lambda: Tally(LATENCY_BUCKETS_S))

    def delivered(self, batch: Batch, now: float) -> int:
        """Counts a batch that was just delivered, and the steps that it finished, which it returns."""
        before = self.steps
        self.batch_rows.observe(batch.rows)
        self.batch_share.observe(batch.rows / batch.ready)
        self.batch_run.observe(batch.run_s)
        self._ran_rows(batch.rows, batch.run_s)
        whole = 0
        for step in batch.steps:
            if step.finished_at != now or step.fault is not None:
                continue
            self.steps += step.train
            self.time_steps += step.length
            self.queue.observe(step.started_at - step.submitted_at, step.train)
            if step.started_at == batch.taken_at:
                whole += step.train
            else:
                self.run.observe(now - step.started_at)
        for cohort in batch.cohorts:
            count = len(cohort.members) * cohort.train
            if count:
                self.steps += count
                self.time_steps += len(cohort.members) * cohort.length
                self.queue.observe(cohort.started_at - cohort.submitted_at, count)
                whole += count
        if whole:
            self.run.observe(now - batch.taken_at, whole)
        return self.steps - before

    def ran(self, engine: Engine, rows: int, *, train: int, length: int, took_s: float) -> None:
        """Counts a run at once that finished all of its steps: `train` of each row, of `length` time steps together.

        Args:
            engine: whose run it was.
            rows: of it.
            train: steps of a row.
            length: time steps of a row.
            took_s: seconds from the steps' acceptance until they were recorded. They waited for nothing.
        """
        steps = rows * train
        self.batch_rows.observe(rows)
        self.batch_share.observe(rows / (rows + engine.ready))
        self.batch_run.observe(engine.ran_s)
        self._ran_rows(rows, engine.ran_s)
        self.steps += steps
        self.time_steps += rows * length
        self.queue.observe(0.0, steps)
        self.run.observe(took_s, steps)

    def _ran_rows(self, rows: int, run_s: float) -> None:
        count, seconds = self.runs_by_rows.get(rows, (0, 0.0))
        self.runs_by_rows[rows] = (count + 1, seconds + run_s)


@dataclass(slots=True)
class StoreFigures:
    """What is counted of the store. Core thread only.

    Attributes:
        failures: visits to the store that it did not answer.
        visit: seconds of each visit.
        written, written_bytes: sessions written, and bytes of their bodies.
        taken: sessions that came in from the store.
        passivated: sessions that left memory for it.
        fenced: sessions that turned out to be another server's.
        swept: records that had expired.
        away: 1 while the store does not answer.
        undurable: sessions that have applied steps which the store does not have.
        lag_s: how long ago the one of them that has waited longest was last gathered to be written.
        asleep: sessions that a stream holds and whose state is in the store alone.
    """

    failures: int = 0
    visit: Tally = field(default_factory=lambda: Tally(LATENCY_BUCKETS_S))
    written: int = 0
    written_bytes: int = 0
    taken: int = 0
    passivated: int = 0
    fenced: int = 0
    swept: int = 0
    away: int = 0
    undurable: int = 0
    lag_s: float = 0.0
    asleep: int = 0


class Metrics:
    """All that is counted. Core thread only.

    Attributes:
        store: of the store; None: there is none.
        certificate_expires_at: unix seconds, of the gRPC port's; None: it has none.
        leaving: the server has begun to stop; it may serve on for a while.
        sample_store: brings up to date what of `store` is not counted but looked up.
    """

    def __init__(self) -> None:
        self.store: StoreFigures | None = None
        self.sample_store: Callable[[], None] = lambda: None
        self.models: dict[tuple[str, str], ModelFigures] = {}
        self.errors: Counter[str] = Counter()
        self.streams = 0
        self.leaving = False
        self.certificate_expires_at: float | None = None
        self._by_engine: dict[Engine, ModelFigures] = {}

    def of(self, engine: Engine) -> ModelFigures:
        """The figures of an engine's model version."""
        figures = self._by_engine.get(engine)
        if figures is None:
            key = (engine.model, engine.version)
            figures = self._by_engine[engine] = self.models.setdefault(key, ModelFigures(*key))
        return figures

    def loaded(self, engine: Engine, load_s: float) -> None:
        """A model version is ready."""
        figures = self.of(engine)
        figures.ready, figures.failed = 1, 0
        figures.load_s = load_s

    def failed(self, model: str, version: str, failed: bool) -> None:
        """A model version is there and cannot be served; or it is not there any more."""
        key = (model, version)
        if failed:
            self.models.setdefault(key, ModelFigures(*key)).failed = 1
        elif key in self.models:
            # No others: whoever asks for what is not there must not leave a series behind.
            self.models[key].failed = 0

    def unloaded(self, engine: Engine) -> None:
        """A model version is gone."""
        figures = self.of(engine)
        del self._by_engine[engine]
        # Another file of that version may have taken its place.
        figures.ready = int(any(other is figures for other in self._by_engine.values()))

    def refused(self, status: status_pb2.Status, count: int = 1) -> None:
        """A refusal goes to callers."""
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            if detail.Unpack(info):
                self.errors[info.reason] += count

    def sample(self, directory: Directory) -> "Sample":
        """A copy of all numbers, for another thread. Some 100 microseconds for each model and 1,000 sessions."""
        for figures in self.models.values():
            figures.sessions = figures.resident_bytes = figures.slab_bytes = figures.queued = 0
        for engine, count in Counter(session.engine for session in directory.sessions.values()).items():
            self.of(engine).sessions += count
        for engine, figures in self._by_engine.items():
            row_bytes = engine.spec.state_bytes
            figures.resident_bytes += (engine.slots.capacity - engine.slots.free) * row_bytes
            figures.slab_bytes += engine.slots.capacity * row_bytes
            figures.queued += engine.ready
        self.sample_store()
        return Sample(
            store=deepcopy(self.store),
            models=deepcopy(list(self.models.values())),
            errors=dict(self.errors),
            streams=self.streams,
            limit=directory.limits.max_sessions,
            opened=directory.opened,
            closed=dict(directory.closed),
            draining=self.leaving or directory.draining,
            certificate_expires_at=self.certificate_expires_at,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """All numbers at one moment."""

    store: StoreFigures | None
    models: Sequence[ModelFigures]
    errors: dict[str, int]
    streams: int
    limit: int
    opened: int
    closed: dict[str, int]
    draining: bool
    certificate_expires_at: float | None
