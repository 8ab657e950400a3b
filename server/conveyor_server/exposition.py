"""What is counted, as Prometheus reads it.

Invariant: TABLE names every metric of the server, and docs/metrics.md is compared with it.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from conveyor_proto.reasons import CODES, Fault
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from conveyor_server.metrics import ModelFigures, Sample, StoreFigures, Tally

Rows: TypeAlias = Iterable[tuple[tuple[str, ...], float | Tally]]

_FAMILIES: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One metric.

    Attributes:
        name: as exposed; a counter's ends in `_total`.
        labels: names of its labels.
        help: one sentence.
        read: label values and number, from a sample.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    read: Callable[[Sample], Rows]

    def family(self, sample: Sample) -> Metric:
        """The metric with a sample's numbers."""
        family = _FAMILIES[self.kind](self.name, self.help, labels=self.labels)
        for labels, value in self.read(sample):
            if isinstance(value, Tally):
                family.add_metric(labels, value.cumulative(), value.total)
            else:
                family.add_metric(labels, value)
        made: Metric = family
        return made


_MODEL = ("model", "version")
# All of them are there from the start, with 0: of a counter that begins with its first event, nobody sees that event.
_REASONS = ("INTERNAL", *sorted(Fault(reason, "").reason_name for reason in CODES))
_CAUSES = ("closed", "expired", "model_unloaded", "superseded", "taken_over")


def _each(value: Callable[[ModelFigures], float | Tally]) -> Callable[[Sample], Rows]:
    return lambda sample: [((item.model, item.version), value(item)) for item in sample.models]


def _store(value: Callable[[StoreFigures], float | Tally]) -> Callable[[Sample], Rows]:
    return lambda sample: [] if sample.store is None else [((), value(sample.store))]


def _counts(known: Iterable[str], counted: Mapping[str, int]) -> Rows:
    return [((label,), count) for label, count in sorted({**dict.fromkeys(known, 0), **counted}.items())]


def _build(_: Sample) -> Rows:
    runtime = next(
        (f"{name} {version}" for name in ("onnxruntime-gpu", "onnxruntime") if (version := _version_of(name))), "none"
    )
    yield ((_version_of("conveyor"), runtime, platform.python_version()), 1)


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("conveyor_sessions_active", "gauge", _MODEL, "Sessions that live on the server.",
        _each(lambda m: m.sessions)),
    Row("conveyor_sessions_limit", "gauge", (), "Sessions that may live on the server, of all models together.",
        lambda s: [((), s.limit)]),
    Row("conveyor_sessions_opened_total", "counter", (), "Sessions created, forked or restored.",
        lambda s: [((), s.opened)]),
    Row("conveyor_sessions_closed_total", "counter", ("cause",), "Sessions that are gone.",
        lambda s: _counts(_CAUSES, s.closed)),
    Row("conveyor_state_resident_bytes", "gauge", _MODEL, "State in slots of the slab that hold some.",
        _each(lambda m: m.resident_bytes)),
    Row("conveyor_state_slab_bytes", "gauge", _MODEL, "State that the slab has room for.",
        _each(lambda m: m.slab_bytes)),
    Row("conveyor_streams_active", "gauge", (), "Open Stream calls.",
        lambda s: [((), s.streams)]),
    Row("conveyor_steps_total", "counter", _MODEL, "Steps applied.",
        _each(lambda m: m.steps)),
    Row("conveyor_time_steps_total", "counter", _MODEL, "Time steps applied.",
        _each(lambda m: m.time_steps)),
    Row("conveyor_replayed_steps_total", "counter", _MODEL, "Answers given from the record.",
        _each(lambda m: m.replayed)),
    Row("conveyor_steps_ready", "gauge", _MODEL, "Steps that wait for a batch.",
        _each(lambda m: m.queued)),
    Row("conveyor_step_queue_seconds", "histogram", _MODEL, "From a step's acceptance to its first batch.",
        _each(lambda m: m.queue)),
    Row("conveyor_step_run_seconds", "histogram", _MODEL, "From a step's first batch to the end of its last.",
        _each(lambda m: m.run)),
    Row("conveyor_step_reply_seconds", "histogram", _MODEL, "From a step's last batch to its answer's transport.",
        _each(lambda m: m.reply)),
    Row("conveyor_batch_rows", "histogram", _MODEL, "Sessions in one run of the model.",
        _each(lambda m: m.batch_rows)),
    Row("conveyor_batch_ready_ratio", "histogram", _MODEL, "Share of the ready sessions that a batch took.",
        _each(lambda m: m.batch_share)),
    Row("conveyor_batch_run_seconds", "histogram", _MODEL, "One run of the model.",
        _each(lambda m: m.batch_run)),
    Row("conveyor_store_away", "gauge", (), "1 while the store does not answer.",
        _store(lambda s: s.away)),
    Row("conveyor_store_visit_seconds", "histogram", (), "One visit to the store: all that waited for it.",
        _store(lambda s: s.visit)),
    Row("conveyor_store_failures_total", "counter", (), "Visits that the store did not answer.",
        _store(lambda s: s.failures)),
    Row("conveyor_store_written_sessions_total", "counter", (), "Sessions written to the store.",
        _store(lambda s: s.written)),
    Row("conveyor_store_written_bytes_total", "counter", (), "State and answers written to the store.",
        _store(lambda s: s.written_bytes)),
    Row("conveyor_store_undurable_sessions", "gauge", (), "Sessions with steps that the store does not have yet.",
        _store(lambda s: s.undurable)),
    Row("conveyor_store_lag_seconds", "gauge", (), "How long the one of them that waits longest has waited.",
        _store(lambda s: s.lag_s)),
    Row("conveyor_sessions_asleep", "gauge", (), "Sessions that streams hold and whose state is in the store alone.",
        _store(lambda s: s.asleep)),
    Row("conveyor_sessions_passivated_total", "counter", (), "Sessions that left memory for the store.",
        _store(lambda s: s.passivated)),
    Row("conveyor_sessions_taken_total", "counter", (), "Sessions that came in from the store.",
        _store(lambda s: s.taken)),
    Row("conveyor_sessions_fenced_total", "counter", (), "Sessions that turned out to be another server's.",
        _store(lambda s: s.fenced)),
    Row("conveyor_sessions_swept_total", "counter", (), "Records that had expired and were removed here.",
        _store(lambda s: s.swept)),
    Row("conveyor_errors_total", "counter", ("reason",), "Refusals sent to callers, by ErrorReason.",
        lambda s: _counts(_REASONS, s.errors)),
    Row("conveyor_model_ready", "gauge", _MODEL, "1 while the model version is served.",
        _each(lambda m: m.ready)),
    Row("conveyor_model_failed", "gauge", _MODEL, "1 while the model version is there and cannot be served.",
        _each(lambda m: m.failed)),
    Row("conveyor_model_load_seconds", "gauge", _MODEL, "How long loading and warming the model version took.",
        _each(lambda m: m.load_s)),
    Row("conveyor_draining", "gauge", (), "1 once the server has begun to stop.",
        lambda s: [((), float(s.draining))]),
    Row("conveyor_certificate_expiry_timestamp_seconds", "gauge", (), "Unix time up to which the certificate is valid.",
        lambda s: [] if s.certificate_expires_at is None else [((), s.certificate_expires_at)]),
    Row("conveyor_build_info", "gauge", ("version", "runtime", "python"), "Always 1; the labels say what runs.",
        _build),
)
# fmt: on


class _Collector:
    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        return (row.family(self._sample) for row in TABLE)


def render(sample: Sample) -> bytes:
    """The text that Prometheus scrapes: TABLE and `process_*`. Any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(sample))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
