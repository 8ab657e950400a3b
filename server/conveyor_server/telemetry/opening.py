"""Opens what the settings ask for: OpenTelemetry's exporters, under its own environment variables.

Invariant: what is ours to say is in the settings; all else is said as OpenTelemetry says it everywhere, by OTEL_*.
"""

import asyncio
import importlib.metadata
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conveyor_server.errors import StartError
from conveyor_server.http import on_core
from conveyor_server.metrics import Sample
from conveyor_server.settings import Settings
from conveyor_server.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from conveyor_server.telemetry.figures import Figures

_log = logging.getLogger("conveyor")
_SCOPE = "conveyor"
_EXPORT_EVERY_MS, _EXPORT_TIMEOUT_MS = 60_000, 30_000
# By OTEL_EXPORTER_OTLP_PROTOCOL: the distribution, and how its exporters are registered.
_PROTOCOLS = {
    "grpc": ("opentelemetry-exporter-otlp-proto-grpc", "otlp_proto_grpc"),
    "http/protobuf": ("opentelemetry-exporter-otlp-proto-http", "otlp_proto_http"),
}


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What goes to a collector.

    Attributes:
        tracing: traces calls; None: nobody does.
    """

    tracing: Tracing | None
    _provider: "TracerProvider | None"
    _figures: "Figures | None"

    async def close(self, last: Sample, patience_s: float) -> None:
        """Sends what there is and lets go, on a thread beside.

        Args:
            last: all numbers, in the end.
            patience_s: how long that is waited for.
        """
        if self._provider is None and self._figures is None:
            return
        done = threading.Event()

        def close() -> None:
            try:
                if self._provider is not None:
                    self._provider.shutdown()
                if self._figures is not None:
                    self._figures.stop(last)
            finally:
                done.set()

        # A daemon: a collector that does not answer does not keep the process.
        threading.Thread(target=close, name="otlp-close", daemon=True).start()
        if not await asyncio.to_thread(done.wait, patience_s):
            _log.warning("the collector of traces and metrics did not answer in time: what it lacks is lost")


def open_telemetry(
    settings: Settings, instance: str, *, now: Callable[[], float], sample: Callable[[], Sample]
) -> Telemetry:
    """What the settings ask for, begun: nothing, perhaps, and nothing where OTEL_SDK_DISABLED is true. Core thread.

    Args:
        settings: of the server.
        instance: names this process among those of the service.
        now: the driver's clock. Any thread.
        sample: all numbers; called on the core thread.

    Raises:
        StartError: what is needed is not installed, or an OTEL_* variable cannot be used.
    """
    if not (settings.traces or settings.otlp_metrics) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Telemetry(None, None, None)
    loop = asyncio.get_running_loop()
    try:
        return _open(settings, instance, now, lambda: on_core(loop, sample))
    except ModuleNotFoundError as error:
        raise StartError(f"{error}: traces and otlp_metrics need pip install 'conveyor[otel]'") from error
    except ValueError as error:
        # Of OpenTelemetry's own, about its variables.
        raise StartError(f"OpenTelemetry cannot be set up: {error}; look at the OTEL_* variables") from error


def _open(settings: Settings, instance: str, now: Callable[[], float], sample: Callable[[], Sample]) -> Telemetry:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from conveyor_server.telemetry.figures import Figures
    from conveyor_server.telemetry.spans import Spans

    version = importlib.metadata.version("conveyor")
    ours: dict[str, str | int] = {
        "service.name": "conveyor",
        "service.version": version,
        "service.instance.id": instance,
        "process.pid": os.getpid(),
    }
    said = OTELResourceDetector().detect().attributes
    resource = Resource.create({key: value for key, value in ours.items() if key not in said})
    provider, tracing, figures = None, None, None
    if settings.traces:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(_exporter("traces", settings.otlp_endpoint)))
        tracing = Spans(provider.get_tracer(_SCOPE, version), settings.trace_steps, now)
    if settings.otlp_metrics:
        figures = Figures(
            _exporter("metrics", settings.otlp_endpoint),
            resource,
            InstrumentationScope(_SCOPE, version),
            sample=sample,
            interval_s=_milliseconds("OTEL_METRIC_EXPORT_INTERVAL", _EXPORT_EVERY_MS) / 1e3,
            timeout_s=_milliseconds("OTEL_METRIC_EXPORT_TIMEOUT", _EXPORT_TIMEOUT_MS) / 1e3,
        )
        figures.start()
    return Telemetry(tracing, provider, figures)


def _exporter(signal: str, endpoint: str) -> Any:
    """The exporter of a signal by the protocol that the environment asks for; where to, the setting says first."""
    variables = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((value for name in variables if (value := os.environ.get(name))), "grpc")
    if protocol not in _PROTOCOLS:
        raise StartError(f"the OTLP protocol {protocol!r} of the environment is not one of {', '.join(_PROTOCOLS)}")
    distribution, name = _PROTOCOLS[protocol]
    found = importlib.metadata.entry_points(group=f"opentelemetry_{signal}_exporter", name=name)
    if not found:
        raise StartError(f"OTLP over {protocol} needs pip install {distribution}")
    return next(iter(found)).load()(**_address(protocol, signal, endpoint))


def _address(protocol: str, signal: str, endpoint: str) -> Mapping[str, str]:
    if not endpoint:
        return {}
    return {"endpoint": endpoint if protocol == "grpc" else f"{endpoint.rstrip('/')}/v1/{signal}"}


def _milliseconds(variable: str, default: int) -> float:
    given = os.environ.get(variable)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise StartError(f"{variable} in the environment is no number of milliseconds above 0")
    return value
