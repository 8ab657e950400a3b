"""The compose file as a project of its own, on the engine that `docker` finds.

Invariant: what was started is taken down again, volumes included, whatever happens in between.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = "http://127.0.0.1:9090"
# Up waits for the demo's training, too.
_BUILD_S, _UP_S, _COMMAND_S = 3600, 900, 120


class SmokeError(Exception):
    """Something is not as the compose file promises; the message says what, and what the services said last."""


def require_engine() -> None:
    """Returns where Compose and an engine are.

    Raises:
        SmokeError: one of them is not there; it says what to install or start.
    """
    if shutil.which("docker") is None:
        raise SmokeError("there is no `docker` in PATH: install Docker with its compose plugin")
    done = _run(["docker", "compose", "version", "--short"], os.environ, _COMMAND_S)
    if done.returncode:
        raise SmokeError(f"Docker Compose 2.20 or newer is needed: {done.stderr.strip()}")
    done = _run(["docker", "info", "--format", "{{.ServerVersion}}"], os.environ, _COMMAND_S)
    if done.returncode:
        raise SmokeError(f"no engine answers: {(done.stderr or done.stdout).strip()}")


class Project:
    """`docker compose` on docker-compose.yml. Left by `with`, it is down.

    Args:
        models: folder that the servers read; None: the project's volume.
        profiles: whose services are there, beside those that always are.
    """

    def __init__(self, models: Path | None, profiles: tuple[str, ...]) -> None:
        self._name = f"conveyor-smoke-{os.getpid()}"
        self._profiles = [word for profile in profiles for word in ("--profile", profile)]
        self._environment = {**os.environ, "MODELS_DIR": "models" if models is None else str(models)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.compose("down", "--volumes", "--remove-orphans", timeout_s=_UP_S)

    def compose(self, *arguments: str, timeout_s: float = _COMMAND_S) -> str:
        """Runs `docker compose ...`; returns what it prints.

        Raises:
            SmokeError: it failed, or took too long.
        """
        command = ["docker", "compose", "--project-name", self._name, *self._profiles, *arguments]
        try:
            done = self._run(command, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise SmokeError(f"docker compose {' '.join(arguments)} took longer than {timeout_s:g} s") from error
        if done.returncode:
            told = f"docker compose {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise SmokeError(told + (self.logs() if arguments[0] == "up" else ""))
        return done.stdout

    def build(self, *services: str) -> None:
        """Builds the images of services."""
        self.compose("build", *services, timeout_s=_BUILD_S)

    def up(self, *services: str) -> None:
        """Starts services; they are healthy when this returns."""
        self.compose("up", "--detach", "--wait", "--no-build", *services, timeout_s=_UP_S)

    def logs(self) -> str:
        """What services said last."""
        command = ["docker", "compose", "--project-name", self._name, *self._profiles, "logs", "--tail", "20"]
        return "\n" + self._run(command, _COMMAND_S).stdout[-6000:]

    def python(self, service: str, code: str) -> str:
        """Runs Python in a service that runs; returns what it prints."""
        return self.compose("exec", "-T", service, "python", "-I", "-c", code).strip()

    def exit_status(self, service: str) -> int:
        """Of a service that has ended."""
        identity = self.compose("ps", "--all", "--quiet", service).strip()
        done = self._run(["docker", "inspect", "--format", "{{.State.ExitCode}}", identity], _COMMAND_S)
        return int(done.stdout)

    def build_argument(self, service: str, name: str) -> str:
        """An argument that a service's image is built with, by the compose file and its variables."""
        found = json.loads(self.compose("config", "--format", "json"))
        return str(found["services"][service]["build"]["args"][name])

    def image_bytes(self, image: str) -> int:
        """The size of an image, unpacked."""
        done = self._run(["docker", "image", "inspect", "--format", "{{.Size}}", image], _COMMAND_S)
        if done.returncode:
            raise SmokeError(f"there is no image {image}: {done.stderr.strip()}")
        return int(done.stdout)

    def _run(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        return _run(command, self._environment, timeout_s)


def query(expression: str) -> dict[str, float]:
    """What Prometheus has now, by `instance`; a series without one is under the empty text."""
    url = f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    result = fetch(url)["data"]["result"]
    return {item["metric"].get("instance", ""): float(item["value"][1]) for item in result}


def fetch(url: str) -> Any:
    """A page of JSON.

    Raises:
        SmokeError: it is not to be had.
    """
    try:
        with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310 - our own http URL
            return json.load(page)
    except OSError as error:
        raise SmokeError(f"{url}: {error}") from error


def wait_for(what: str, holds: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Returns once it holds.

    Raises:
        SmokeError: it does not, within `patience_s`.
    """
    until = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > until:
            raise SmokeError(f"in {patience_s:g} s it never was so: {what}")
        time.sleep(0.5)


def _run(command: list[str], environment: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own commands, no shell
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
