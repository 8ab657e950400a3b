"""What is shown: made of two samples of each server, by plain functions.

Invariant: nothing here asks anybody anything or draws anything; equal samples give equal views.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import conveyor
from conveyor.cli.top.change import Change, added, quantile, shares
from conveyor.cli.top.page import Page
from conveyor.cli.top.sample import Sample

Order: TypeAlias = Literal["active", "idle", "steps", "pending"]
ORDERS: tuple[Order, ...] = get_args(Order)
# Upper bounds of the idle times that sessions are counted by, and how they are called.
IDLE = ((1.0, "<1 s"), (10.0, "<10 s"), (60.0, "<1 min"), (600.0, "<10 min"), (3600.0, "<1 h"), (float("inf"), "more"))


@dataclass(frozen=True, slots=True)
class ServerView:
    """One server. What is not known is None."""

    name: str
    health: str
    version: str
    streams: float | None
    sessions: float | None
    sessions_limit: float | None
    steps_per_s: float | None
    cpu: float | None
    resident_bytes: float | None
    store: str
    troubles: Sequence[str]


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model version, over all servers. Latencies in seconds; what is not known is None.

    Attributes:
        status: the least good of those that servers say.
        failure: why it is not served, where a server says so.
        busy: share of the time that runs of it took, on the mean of the servers that have it.
        batches: share of the runs by the upper bound of their sizes.
    """

    name: str
    version: str
    status: str
    failure: str
    device: str
    sessions: float
    ready: float | None
    steps_per_s: float | None
    time_steps_per_s: float | None
    batch: float | None
    busy: float | None
    queue_p50_s: float | None
    queue_p99_s: float | None
    run_p50_s: float | None
    run_p99_s: float | None
    reply_p99_s: float | None
    batches: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session; `steps_per_s` is None until it was seen twice."""

    id: str
    model: str
    version: str
    idle_s: float
    steps: int
    steps_per_s: float | None
    pending: int
    durability: str
    unstored: int
    where: str
    attached: bool


@dataclass(frozen=True, slots=True)
class StoreView:
    """What all servers say of their stores, together; latencies and the lag in seconds."""

    away: int
    of: int
    visit_p50_s: float | None
    visit_p99_s: float | None
    written_per_s: float
    failures_per_s: float
    undurable: float
    lag_s: float
    asleep: float


@dataclass(frozen=True, slots=True)
class View:
    """All that is shown.

    Attributes:
        seconds: between the samples; the rates are of this time.
        idle: sessions by idle time, in the order of IDLE.
        seen: sessions that were looked at, out of `all_sessions`.
        store: None where no server has one.
        errors: refusals a second and altogether, by reason, the most frequent now first.
        closed: sessions closed, a second and altogether, by cause.
    """

    seconds: float
    servers: Sequence[ServerView]
    models: Sequence[ModelView]
    sessions: Sequence[SessionView]
    idle: Mapping[str, int]
    seen: int
    all_sessions: int
    store: StoreView | None
    errors: Mapping[str, tuple[float, float]]
    closed: Mapping[str, tuple[float, float]]

    @property
    def answered(self) -> bool:
        """Every server that was asked for its health said one."""
        return all(server.health != "away" for server in self.servers)


def view(before: Sequence[Sample], after: Sequence[Sample], order: Order = "active") -> View:
    """What two samples of each server show.

    Args:
        before: the earlier ones.
        after: the later ones, of the same servers in the same order.
        order: of the sessions: the least idle first, the most idle, the most steps a second, or the most pending.
    """
    pairs = list(zip(before, after, strict=True))
    changes = [change for pair in pairs if (change := _change(*pair)) is not None]
    sessions = _sessions(before, after, order)
    return View(
        seconds=max((late.at_s - early.at_s for early, late in pairs), default=0.0),
        servers=[_server(late, _change(early, late)) for early, late in pairs],
        models=_models(after, changes),
        sessions=sessions,
        idle=_by_idle(sessions),
        seen=len(sessions),
        all_sessions=max(len(sessions), *(sample.all_sessions for sample in after)),
        store=_store(changes),
        errors=_counted("conveyor_errors_total", "reason", changes),
        closed=_counted("conveyor_sessions_closed_total", "cause", changes),
    )


def _change(early: Sample, late: Sample) -> Change | None:
    """None: there are not two pages."""
    if early.page is None or late.page is None or late.at_s <= early.at_s:
        return None
    return Change(early.page, late.page, late.at_s - early.at_s)


def _server(sample: Sample, change: Change | None) -> ServerView:
    page = sample.page or Page()
    away = page.total("conveyor_store_away")
    health = sample.health
    if page.total("conveyor_draining"):
        health = "draining"
    return ServerView(
        name=sample.server.name,
        health=health,
        version=", ".join(sorted(page.values_of("version", "conveyor_build_info"))),
        streams=page.total("conveyor_streams_active"),
        sessions=page.total("conveyor_sessions_active"),
        sessions_limit=page.total("conveyor_sessions_limit"),
        steps_per_s=None if change is None else change.rate("conveyor_steps_total"),
        cpu=None if change is None else change.rate("process_cpu_seconds_total"),
        resident_bytes=page.total("process_resident_memory_bytes"),
        store="" if sample.page is None else "none" if away is None else "away" if away else "ok",
        troubles=tuple(sample.troubles),
    )


def _models(samples: Sequence[Sample], changes: Sequence[Change]) -> list[ModelView]:
    told: dict[tuple[str, str], list[conveyor.Model]] = {}
    for sample in samples:
        for model in sample.models:
            told.setdefault((model.name, model.version), []).append(model)
    counted = {
        (dict(labels)["model"], dict(labels)["version"])
        for change in changes
        for labels in change.after.series.get("conveyor_model_ready", {})
    }
    return [_model(*key, told.get(key, []), changes) for key in sorted({*told, *counted})]


def _model(name: str, version: str, told: Sequence[conveyor.Model], changes: Sequence[Change]) -> ModelView:
    labels = {"model": name, "version": version}
    having = [each for each in changes if each.after.total("conveyor_model_ready", **labels) is not None]
    pages = [each.after for each in having]

    def rate(metric: str) -> float | None:
        return sum(each.rate(metric, **labels) for each in having) if having else None

    def over(metric: str, share: float) -> float | None:
        return quantile(share, added([each.buckets(metric, **labels) for each in having]))

    rows = added([each.buckets("conveyor_batch_rows", **labels) for each in having])
    runs = rows.get(float("inf"), 0.0)
    busy = rate("conveyor_batch_run_seconds_sum")
    counted = sum(page.total("conveyor_sessions_active", **labels) or 0.0 for page in pages)
    return ModelView(
        name=name,
        version=version,
        status=_status(told, pages, labels),
        failure=next((model.failure for model in told if model.failure), ""),
        device=", ".join(sorted({model.device for model in told if model.device})),
        sessions=counted if pages else sum(model.sessions for model in told),
        ready=sum(page.total("conveyor_steps_ready", **labels) or 0.0 for page in pages) if pages else None,
        steps_per_s=rate("conveyor_steps_total"),
        time_steps_per_s=rate("conveyor_time_steps_total"),
        batch=sum(each.increase("conveyor_batch_rows_sum", **labels) for each in having) / runs if runs else None,
        busy=None if busy is None else busy / len(having),
        queue_p50_s=over("conveyor_step_queue_seconds", 0.5),
        queue_p99_s=over("conveyor_step_queue_seconds", 0.99),
        run_p50_s=over("conveyor_step_run_seconds", 0.5),
        run_p99_s=over("conveyor_step_run_seconds", 0.99),
        reply_p99_s=over("conveyor_step_reply_seconds", 0.99),
        batches=shares(rows),
    )


def _status(told: Sequence[conveyor.Model], pages: Sequence[Page], labels: Mapping[str, str]) -> str:
    if told:
        least_good = ("failed", "loading", "ready")
        return min((model.status for model in told), key=lambda each: (each in least_good, each))
    ready = any(page.total("conveyor_model_ready", **labels) for page in pages)
    return "ready" if ready else "unloaded"


def _sessions(before: Sequence[Sample], after: Sequence[Sample], order: Order) -> list[SessionView]:
    """Each session once: servers of one store all list what is in it, and the one that has it in memory knows more."""
    known: dict[str, SessionView] = {}
    for early, late in zip(before, after, strict=True):
        steps_before = {session.id: session.applied_seq for session in early.sessions}
        for session in late.sessions:
            if session.id in known and not session.resident:
                continue
            first = steps_before.get(session.id)
            seconds = late.at_s - early.at_s
            known[session.id] = SessionView(
                id=session.id,
                model=session.model,
                version=session.version,
                idle_s=max(0.0, (late.now - session.last_used_at).total_seconds()),
                steps=session.applied_seq,
                steps_per_s=None if first is None or seconds <= 0 else (session.applied_seq - first) / seconds,
                pending=session.pending_steps,
                durability=session.durability,
                unstored=0 if session.durability == "none" else max(0, session.applied_seq - session.durable_seq),
                where="store" if session.durability != "none" and not session.resident else "memory",
                attached=session.attached,
            )
    keys: dict[Order, Callable[[SessionView], float]] = {
        "active": lambda each: each.idle_s,
        "idle": lambda each: -each.idle_s,
        "steps": lambda each: -(each.steps_per_s or 0.0),
        "pending": lambda each: -each.pending,
    }
    return sorted(known.values(), key=lambda each: (keys[order](each), each.id))


def _by_idle(sessions: Iterable[SessionView]) -> dict[str, int]:
    counts = Counter(next(name for bound, name in IDLE if session.idle_s < bound) for session in sessions)
    return {name: counts[name] for _, name in IDLE}


def _store(changes: Sequence[Change]) -> StoreView | None:
    having = [each for each in changes if each.after.total("conveyor_store_away") is not None]
    if not having:
        return None

    def now(metric: str) -> float:
        return sum(each.after.total(metric) or 0.0 for each in having)

    visits = added([each.buckets("conveyor_store_visit_seconds") for each in having])
    return StoreView(
        away=int(now("conveyor_store_away")),
        of=len(having),
        visit_p50_s=quantile(0.5, visits),
        visit_p99_s=quantile(0.99, visits),
        written_per_s=sum(each.rate("conveyor_store_written_sessions_total") for each in having),
        failures_per_s=sum(each.rate("conveyor_store_failures_total") for each in having),
        undurable=now("conveyor_store_undurable_sessions"),
        lag_s=max(each.after.total("conveyor_store_lag_seconds") or 0.0 for each in having),
        asleep=now("conveyor_sessions_asleep"),
    )


def _counted(metric: str, label: str, changes: Sequence[Change]) -> dict[str, tuple[float, float]]:
    rows = []
    for value in {each for change in changes for each in change.after.values_of(label, metric)}:
        total = sum(change.after.total(metric, **{label: value}) or 0.0 for change in changes)
        # Servers name what has never happened, too.
        if total:
            rows.append((value, sum(change.rate(metric, **{label: value}) for change in changes), total))
    return {value: (rate, total) for value, rate, total in sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))}
