"""What figures depend on besides Conveyor: the machine and the versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from benchmarks.accounting import processor_name


def describe_machine() -> dict[str, Any]:
    """What the figures depend on. No host or user names."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("conveyor", "onnxruntime", "grpcio", "protobuf", "numpy")},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
