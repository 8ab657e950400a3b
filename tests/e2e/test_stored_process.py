"""Real processes and their SQLite file: a restart, a kill, and workers that take over each other's sessions."""

import os
import signal
from pathlib import Path

import conveyor
import numpy as np
import pytest

from tests.e2e.conftest import Nets, Server, free_port, launch, wait_serving
from tests.e2e.test_workers import start_workers

__all__ = ["start_workers"]
X = np.random.default_rng(4).standard_normal((120, 4)).astype(np.float32)


class Restarted:
    """A server that can be started again on its port, with its file."""

    def __init__(self, nets: Nets, folder: Path, *flags: str) -> None:
        self._start = (nets.folder, folder)
        self.port = free_port()
        self._flags = ("--port", str(self.port), "--store", f"sqlite:{folder}/sessions.db", *flags)
        self.server = self._launch()

    def again(self, number: signal.Signals) -> int:
        """Ends it by a signal and starts it anew; returns its exit status."""
        status = self.server.stop(number)
        self.server = self._launch()
        return status

    def _launch(self) -> Server:
        server = launch(*self._start, *self._flags)
        server.port = self.port
        wait_serving(server)
        return server


@pytest.fixture
def restarted(nets: Nets, tmp_path: Path, transport: str):
    server = Restarted(nets, tmp_path, "--transport", transport)
    yield server
    server.server.process.kill()
    server.server.process.wait(10)


def undisturbed(client: conveyor.Client) -> list[np.ndarray]:
    with client.session("lstm", durability="none") as session:
        return list(session.stream(X))


@pytest.mark.parametrize(("number", "durability"), [(signal.SIGKILL, "async"), (signal.SIGTERM, "sync")])
def test_a_stream_goes_on_through_a_restart(restarted: Restarted, number: signal.Signals, durability: str) -> None:
    answers = []
    with conveyor.connect(f"127.0.0.1:{restarted.port}", resume_timeout_s=60.0) as client:
        expected = undisturbed(client)
        with client.session("lstm", durability=durability) as session:
            for answer in session.stream(X):
                answers.append(answer)
                if len(answers) in {20, 70}:
                    status = restarted.again(number)
                    assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert len(answers) == len(X)
    assert all(map(np.array_equal, answers, expected))


def test_a_session_that_nobody_holds_outlives_the_process(restarted: Restarted) -> None:
    with conveyor.connect(f"127.0.0.1:{restarted.port}", resume_timeout_s=60.0) as client:
        expected = undisturbed(client)
        with client.session("lstm", session_id="kept", detach_on_exit=True) as session:
            answers = list(session.stream(X[:50]))
    restarted.again(signal.SIGKILL)
    with conveyor.connect(f"127.0.0.1:{restarted.port}") as client:
        [info] = client.sessions()
        assert (info.id, info.applied_seq, info.resident, info.durability) == ("kept", 50, False, "async")
        with client.session("lstm", session_id="kept", resume=True) as session:
            answers += list(session.stream(X[50:]))
    assert all(map(np.array_equal, answers, expected))


def test_workers_take_over_the_sessions_of_one_that_is_killed(start_workers, tmp_path: Path) -> None:
    group = start_workers("--store", f"sqlite:{tmp_path}/sessions.db")
    workers = started = group.workers()
    answers = []
    with conveyor.connect(f"127.0.0.1:{group.port}", resume_timeout_s=60.0) as client:
        expected = undisturbed(client)
        with client.session("lstm", own_stream=True) as session:
            for answer in session.stream(X):
                answers.append(answer)
                if len(answers) in {20, 70}:
                    [holder] = [worker for worker in workers if worker.streams()]
                    os.kill(holder.pid, signal.SIGKILL)
                    # The one that is left, and the one that takes its place.
                    started = group.workers(len(started) + 1)
                    workers = [worker for worker in (*workers, started[-1]) if worker is not holder]
    assert all(map(np.array_equal, answers, expected))
    group.heard("its sessions go on elsewhere, from the store", 2)


def test_a_file_that_is_no_store_is_said_at_the_start(nets: Nets, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, and long enough to be looked at" * 100)
    server = launch(nets.folder, tmp_path, "--store", f"sqlite:{tmp_path}/notes.txt")
    assert server.process.wait(30) == 2
    assert "notes.txt" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("flags", [("--durability", "async"), ("--max-durability", "sync"), ("--store", "tape:")])
def test_what_cannot_be_meant_is_said_at_the_start(nets: Nets, tmp_path: Path, flags: tuple[str, str]) -> None:
    server = launch(nets.folder, tmp_path, *flags)
    assert server.process.wait(30) == 2
    assert "--store" in server.log.read_text()
