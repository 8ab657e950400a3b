"""A real Prometheus with its promtool: those in PATH, or Debian's packages, unpacked beside the environment.

Invariant: nothing is installed into the system, and no service is started; of two tests that want the packages at once,
one fetches them.
"""

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from tests.fault.process import Process, free_ports

_PACKAGE = "prometheus"
_HOW = (
    "the tests need `prometheus` and `promtool`, 2.42 or newer, in PATH: install them (Debian and Ubuntu: apt-get "
    "install prometheus; elsewhere: the archive from prometheus.io has both)"
)
_READY_S = 30.0


class Programs(NamedTuple):
    """Where they are."""

    prometheus: Path
    promtool: Path


def programs() -> Programs:
    """Prometheus and promtool. Fetches Debian's packages the first time, where they are not in PATH.

    Raises:
        AssertionError: they cannot be had; it says what to install.
    """
    found = [shutil.which(name) for name in Programs._fields]
    if all(found):
        return Programs(*(Path(str(path)) for path in found))
    folder = Path(sys.prefix) / "debian" / _PACKAGE
    unpacked = Programs(*(folder / "usr" / "bin" / name for name in Programs._fields))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{_PACKAGE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _unpack(folder)
    return unpacked


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What promtool says, and its exit status."""
    command = [programs().promtool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _unpack(folder: Path) -> None:
    assert shutil.which("apt-get"), _HOW
    assert shutil.which("dpkg"), _HOW
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        out = Path(temporary) / "out"
        # From Debian 14 on, promtool is a package of its own.
        for name in Programs._fields:
            if not (out / "usr" / "bin" / name).exists():
                _fetch(name, Path(temporary), out)
        out.rename(folder)


def _fetch(package: str, folder: Path, out: Path) -> None:
    download = ["apt-get", "download", "--quiet", package]
    done = _run(download, folder)
    if done.returncode:
        # A fresh container has no lists of packages.
        _run(["apt-get", "update", "--quiet"], folder)
        done = _run(download, folder)
    assert done.returncode == 0, f"{_HOW}; fetching Debian's package failed:\n{done.stdout}{done.stderr}"
    (file,) = folder.glob(f"{package}_*.deb")
    done = _run(["dpkg", "-x", str(file), str(out)], folder)
    assert done.returncode == 0, f"{_HOW}; unpacking {file.name} failed:\n{done.stderr}"


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


class PrometheusProcess(Process):
    """Started by `with`; scrapes targets of loopback as job `conveyor`.

    Args:
        folder: its own, for its settings, data and log.
        targets: label values of `instance`, and the ports of their metrics.
        rules: files of rules.
        every_s: between two scrapes, and two evaluations of the rules.
    """

    def __init__(
        self, folder: Path, targets: Mapping[str, int], rules: Sequence[Path], *, every_s: float = 0.5
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        [self.port] = free_ports(1)
        every = f"{round(every_s * 1000)}ms"
        scraped = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": instance}} for instance, port in targets.items()
        ]
        settings = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(file) for file in rules],
            "scrape_configs": [{"job_name": "conveyor", "static_configs": scraped}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        flags += [f"--web.listen-address=127.0.0.1:{self.port}"]
        super().__init__([str(programs().prometheus), *flags], folder / "log")

    def __enter__(self) -> Self:
        """Starts it; it answers when this returns."""
        self.start()
        try:
            self.wait_until(self._ready, _READY_S)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self.kill()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now: `metric`, its labels, and `value`, time and number as text.

        Raises:
            AssertionError: Prometheus does not understand it.
        """
        data = self._ask("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def value(self, expression: str) -> float:
        """The one number that an expression has; 0 where it has none."""
        found = self.query(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} series"
        return float(found[0]["value"][1]) if found else 0.0

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are pending or firing: `labels`, `annotations`, `state`."""
        found: list[dict[str, Any]] = self._ask("alerts")["alerts"]
        return found

    def firing(self, name: str) -> list[dict[str, Any]]:
        """The firing alerts of a name."""
        return [item for item in self.alerts() if item["labels"]["alertname"] == name and item["state"] == "firing"]

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}"
        body = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(url, body, timeout=20) as page:
                return json.load(page)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5) as page:
                return bool(page.status == 200)
        except OSError:
            return False
