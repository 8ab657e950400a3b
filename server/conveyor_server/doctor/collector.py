"""The collector that traces and metrics go to, where they do.

Invariant: nothing is sent to it; whether something listens there is asked by opening a connection.
"""

import importlib.util
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.settings import Settings

_DEFAULT = "http://localhost:4317"
_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PORT = 4317
_PATIENCE_S = 2.0


def check(settings: Settings) -> Iterator[Finding]:
    """What is needed to send, and whether the collector is there."""
    if not (settings.traces or settings.otlp_metrics):
        yield good("no traces, and metrics on the metrics page alone")
        return
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        yield warning(
            "traces or otlp_metrics are on, and OTEL_SDK_DISABLED=true in the environment: nothing is sent",
            "take one of them away",
        )
        return
    if not _is_installed("opentelemetry.sdk"):
        yield bad("traces and otlp_metrics need OpenTelemetry", "pip install 'conveyor[otel]'")
        return
    yield _reached(settings.otlp_endpoint or os.environ.get(_VARIABLE) or _DEFAULT)


def _reached(endpoint: str) -> Finding:
    fix = f"--otlp-endpoint or {_VARIABLE} says where it is; the server serves without it, and what it lacks is lost"
    # Without a scheme it is a host and a port, as the environment may have it.
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    try:
        address = (parts.hostname or "", parts.port or _PORT)
        socket.create_connection(address, timeout=_PATIENCE_S).close()
    except (OSError, ValueError) as error:
        # Not the whole URL: it may have a password.
        return warning(f"no collector at {parts.hostname}: {error}", fix)
    return good(f"something listens at {address[0]}:{address[1]}, where the collector is to be")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
