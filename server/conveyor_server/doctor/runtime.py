"""What the server runs on: Python's and grpcio's versions, the compiled part, and the telemetry of onnxruntime.

Invariant: it imports no onnxruntime, so that its telemetry can still be turned off.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

from conveyor_server import compiled
from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.settings import Settings

_LEAST = (3, 11)
_SERVING = ("grpcio", "protobuf", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "prometheus-client")
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
# As it was found: the command sets it, once this module is there, for the checks that load onnxruntime.
_FOUND = os.environ.get(_TELEMETRY)


def check(settings: Settings) -> Iterator[Finding]:
    """Versions, the fast transport, the compiled part, telemetry."""
    yield python(sys.version_info[:2], platform.python_version())
    yield good("installed: " + ", ".join(f"{name} {version}" for name in _SERVING if (version := _version(name))))
    yield transport(settings, _version("grpcio"), *_internals())
    yield built(is_built=compiled.BUILT)
    yield telemetry(_FOUND)


def python(version: tuple[int, ...], name: str) -> Finding:
    """Python's version."""
    if version < _LEAST:
        return bad(f"Python {name} is too old", "use Python 3.11 or newer")
    return good(f"Python {name}")


def transport(settings: Settings, version: str, tested: tuple[str, ...], why_not: str) -> Finding:
    """Which transport there will be.

    Args:
        settings: of the server.
        version: grpcio's.
        tested: versions that the fast transport's tests have run on.
        why_not: why it cannot be used; "": it can, as far as is seen without starting it.
    """
    if settings.transport == "aio":
        return good("transport aio, on grpcio's public API; cq carries several times as much")
    fix = f"pip install grpcio=={tested[-1]}" if tested else "install another grpcio"
    if why_not and settings.transport == "cq":
        return bad(f"transport cq cannot be used with grpcio {version}: {why_not}", f"{fix}, or --transport auto")
    if why_not:
        return warning(f"transport auto will be aio, the slower one, with grpcio {version}: {why_not}", fix)
    if version not in tested:
        return warning(
            f"the fast transport was tested with grpcio {', '.join(tested)}, and this is {version}: the server tries "
            "it when it starts, and takes the slower one where it does not work",
            fix,
        )
    return good(f"the fast transport was tested with grpcio {version}")


def built(*, is_built: bool) -> Finding:
    """Whether the compiled part is there."""
    if is_built:
        return good("the compiled part is built")
    return warning(
        "the compiled part is not built, so steps go by arrays, which costs up to twice as much CPU",
        "install the server where there are a C compiler and Python's headers, or from a wheel for this platform",
    )


def telemetry(value: str | None) -> Finding:
    """The telemetry of onnxruntime, which the server turns off by itself."""
    if value in {None, "1"}:
        return good(f"onnxruntime's telemetry is off: conveyor serve sets {_TELEMETRY}=1")
    return warning(
        f"{_TELEMETRY}={value} in the environment: conveyor serve turns telemetry off all the same, and other "
        "programs do not",
        f"set {_TELEMETRY}=1, or take it out of the environment",
    )


def _internals() -> tuple[tuple[str, ...], str]:
    """Versions that were tested, and why the fast transport cannot be used."""
    try:
        from conveyor_server.transport.completion import TESTED
    except (ImportError, AttributeError) as error:
        return (), f"this grpcio has other internals ({error})"
    return TESTED, ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
