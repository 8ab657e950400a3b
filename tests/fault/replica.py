"""One Conveyor server, as `conveyor serve` runs it, on ports that stay its own through all of its lives."""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import conveyor

from tests.fault.process import Process, free_ports

ROOT = Path(__file__).resolve().parents[2]
_READY_S = 60.0
_ASK_S = 2.0
# Longer than it drains.
_END_S = 30.0
_DRAIN_S = 10.0


class Replica(Process):
    """A server.

    Args:
        name: `r0`, `r1`, ...
        models: the model repository.
        folder: where its log goes.
        flags: more of `conveyor serve`.
        mutant: a name of tests.fault.mutants: the server has that fault; "": it is as it should be.

    Attributes:
        port, metrics_port: of gRPC, and of its pages.
    """

    def __init__(self, name: str, models: Path, folder: Path, flags: Sequence[str] = (), *, mutant: str = "") -> None:
        self.name = name
        self.port, self.metrics_port = free_ports(2)
        self._models = models
        super().__init__([], folder / f"{name}.log", environment=_environment(), folder=ROOT)
        self.become(flags, mutant=mutant)

    def become(self, flags: Sequence[str], *, mutant: str = "") -> None:
        """What `start` starts from now on, on the same ports."""
        program = ["tests.fault.mutants", mutant] if mutant else ["conveyor_server"]
        command = [sys.executable, "-W", "error", "-m", *program, "--models", str(self._models), "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        self.command = [*command, "--threads", "1", "--drain-s", f"{_DRAIN_S:g}", *flags]

    def wait_ready(self) -> None:
        """Returns once it takes sessions."""
        self.wait_until(self._ready, _READY_S)

    def terminate(self, timeout_s: float = _END_S) -> int:
        """Asks it to end, as a deploy does; returns its exit status."""
        return super().terminate(timeout_s)

    def held(self) -> list[str]:
        """Ids of the sessions whose streams end here, as it says itself. Empty where it cannot say."""
        try:
            with conveyor.connect(f"127.0.0.1:{self.port}", timeout_s=_ASK_S, connect_timeout_s=_ASK_S) as client:
                return [session.id for session in client.sessions() if session.attached]
        except conveyor.ConveyorError:
            return []

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/readyz", timeout=_ASK_S) as page:
                return bool(page.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _environment() -> dict[str, str]:
    # What whoever runs this has set of Conveyor's is not meant for these servers.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
    return {**kept, "ORT_DISABLE_TELEMETRY": "1"}
