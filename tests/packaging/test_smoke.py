"""`make compose-smoke` where there is no engine: it says so. And what it compares, on a server without containers.

Invariant: no engine is needed. What it does with one is shown by whoever has one and runs it.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from deploy.smoke import streams
from examples._demo.server import Server


def _smoke(root: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(path)}
    command = [sys.executable, "-m", "deploy.smoke"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_without_docker_it_says_what_to_install(root: Path, tmp_path: Path) -> None:
    done = _smoke(root, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "install Docker" in done.stderr


def test_without_an_engine_it_says_so(root: Path, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\n[ $1 = info ] || exit 0\necho Cannot connect to the Docker daemon >&2\nexit 1\n")
    docker.chmod(0o755)
    done = _smoke(root, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no engine answers: Cannot connect to the Docker daemon" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_crowd_waits_halfway_and_has_the_answers_of_an_undisturbed_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the three servers' default is, with their store.
    monkeypatch.setenv("CONVEYOR_STORE", f"sqlite:{tmp_path}/sessions.db")
    models = tmp_path / "models"
    streams.export(models)
    assert all(path.stat().st_mode & 0o004 for path in models.rglob("*"))
    with Server(models, tmp_path / "log") as server:
        expected = streams.undisturbed(server.target)
        before = _steps(server)
        crowd = streams.Crowd(server.target)
        crowd.wait_half()
        assert _steps(server) - before == streams.SESSIONS * streams.FIRST
        crowd.go_on()
        assert np.array_equal(crowd.finish(), expected)
    assert threading.active_count() < streams.SESSIONS


def test_a_crowd_that_cannot_begin_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with Server(tmp_path / "models", tmp_path / "log") as server:
        crowd = streams.Crowd(server.target)
        with pytest.raises(threading.BrokenBarrierError):
            crowd.wait_half()


def _steps(server: Server) -> float:
    (family,) = [each for name, each in server.metrics().items() if name == "conveyor_steps"]
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
