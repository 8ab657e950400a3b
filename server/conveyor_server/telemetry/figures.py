"""The metrics of /metrics, in the same names, over OTLP.

Invariant: what is exported is exposition.TABLE, of one sample. The SDK would aggregate what its own instruments are
told; ours is aggregated already, so that of the SDK only the exporter is used.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from conveyor_server.exposition import TABLE, Row
from conveyor_server.metrics import Sample, Tally

_log = logging.getLogger("conveyor")
_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}
Data: TypeAlias = Sum | Gauge | Histogram


class Figures:
    """Exports a sample every so often, on a thread of its own.

    Args:
        exporter: of OTLP.
        resource: who says it.
        scope: what says it.
        sample: all numbers, from any thread; TimeoutError or RuntimeError where they cannot be had now.
        interval_s: from one export to the next.
        timeout_s: of an export.
    """

    def __init__(
        self,
        exporter: MetricExporter,
        resource: Resource,
        scope: InstrumentationScope,
        *,
        sample: Callable[[], Sample],
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self._exporter = exporter
        self._resource = resource
        self._scope = scope
        self._sample = sample
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._began_ns = time.time_ns()
        self._stopping = threading.Event()
        # A daemon: who ends is not kept by a collector that does not answer.
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)

    def start(self) -> None:
        """Exports from now on."""
        self._thread.start()

    def stop(self, last: Sample) -> None:
        """Exports what there is in the end, and lets go. Blocks as long as the collector takes."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._export(last)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._export(self._sample())
            except (TimeoutError, RuntimeError) as error:
                _log.warning("the core thread gave no metrics to export: %s", error)

    def _export(self, sample: Sample) -> None:
        now_ns = time.time_ns()
        metrics = [self._metric(row, sample, now_ns) for row in TABLE]
        scoped = ScopeMetrics(self._scope, [metric for metric in metrics if metric.data.data_points], "")
        data = MetricsData([ResourceMetrics(self._resource, [scoped], "")])
        # Its failures are in the log: the exporter says them itself.
        self._exporter.export(data, timeout_millis=self._timeout_s * 1e3)

    def _metric(self, row: Row, sample: Sample, now_ns: int) -> Metric:
        return Metric(row.name, row.help, unit(row.name), self._data(row, sample, now_ns))

    def _data(self, row: Row, sample: Sample, now_ns: int) -> Data:
        if row.kind == "histogram":
            return Histogram(list(self._tallies(row, sample, now_ns)), AggregationTemporality.CUMULATIVE)
        points = [
            NumberDataPoint(dict(zip(row.labels, labels, strict=True)), self._began_ns, now_ns, value)
            for labels, value in row.read(sample)
            if not isinstance(value, Tally)
        ]
        if row.kind == "counter":
            return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
        return Gauge(points)

    def _tallies(self, row: Row, sample: Sample, now_ns: int) -> Iterator[HistogramDataPoint]:
        for labels, tally in row.read(sample):
            if isinstance(tally, Tally):
                yield HistogramDataPoint(
                    dict(zip(row.labels, labels, strict=True)),
                    self._began_ns,
                    now_ns,
                    sum(tally.counts),
                    tally.total,
                    tally.counts,
                    _bounds(tally),
                    # Optional in OTLP, and not known here: no value is remembered by itself.
                    min=None,  # type: ignore[arg-type]
                    max=None,  # type: ignore[arg-type]
                )


def _bounds(tally: Tally) -> Sequence[float]:
    return tuple(map(float, tally.bounds))


def unit(name: str) -> str:
    """A metric's unit as UCUM writes it, by its name."""
    return _UNITS.get(name.removesuffix("_total").rpartition("_")[2], "")
