"""Several real workers behind one port: who gets what, how they end, and who takes the place of one that died."""

import contextlib
import itertools
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from conveyor_proto.codec import decode, encode
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
WAIT_S = 60.0
_READY = re.compile(r"worker (\d+) is ready: process (\d+), metrics on 127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Worker:
    index: int
    pid: int
    metrics_port: int

    def streams(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as page:
            return int(float(re.search(r"^conveyor_streams_active (\S+)$", page.read().decode(), re.MULTILINE)[1]))


class Group:
    """A supervisor and its workers, heard through the log that they share."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._silent = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self._silent = True
            self._said.notify_all()

    def heard(self, pattern: str | re.Pattern[str], count: int = 1) -> list[re.Match[str]]:
        """Waits for a number of lines."""

        def found() -> list[re.Match[str]]:
            return [match for match in (re.search(pattern, line) for line in self.lines) if match]

        with self._said:
            self._said.wait_for(lambda: len(found()) >= count or self._silent, WAIT_S)
            assert len(found()) >= count, "".join(self.lines)
            return found()

    def gone(self) -> None:
        """Waits until no process is left that could write to the log: the supervisor or any worker."""
        with self._said:
            assert self._said.wait_for(lambda: self._silent, WAIT_S), "".join(self.lines)

    def workers(self, count: int = 2) -> list[Worker]:
        """The first so many that became ready."""
        return [Worker(*map(int, match.groups())) for match in self.heard(_READY, count)[:count]]

    @property
    def port(self) -> int:
        return int(self.heard(r"share grpc on 127\.0\.0\.1:(\d+)")[0][1])

    def close(self) -> None:
        """Kills what is left of it."""
        self.process.kill()
        self.process.wait(WAIT_S)
        # The workers follow, in order or, if that is what is broken, by force.
        self._reader.join(WAIT_S)
        for match in (re.search(_READY, line) for line in self.lines):
            if match and self._reader.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(match[2]), signal.SIGKILL)
        self._reader.join(WAIT_S)
        self.process.stderr.close()


def command(models: Path, *flags: str) -> list[str]:
    serve = [sys.executable, "-W", "error", "-m", "conveyor_server", "--models", str(models), "--workers", "2"]
    serve += ["--log-format", "text"]
    return [*serve, "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", *flags]


StartWorkers = Callable[..., Group]


@pytest.fixture
def start_workers(request, nets) -> Iterator[StartWorkers]:
    """On the default transport, or on the test's `transport`."""
    chosen = ()
    if "transport" in request.fixturenames:
        chosen = ("--transport", request.getfixturevalue("transport"))
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Group:
            process = subprocess.Popen(command(nets.folder, *chosen, *flags), stderr=subprocess.PIPE, text=True)
            group = Group(process)
            stack.callback(group.close)
            return group

        yield start


class Client:
    """A connection of its own and one stream on it, with one session."""

    def __init__(self, group: Group, session_id: str) -> None:
        # Without its own pool of connections it would share that of the other clients.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{group.port}", options=options)
        self._stub = session_pb2_grpc.SessionServiceStub(self.channel)
        self.session_id = session_id
        self.worker: Worker | None = None
        self.seq = 0
        self._requests: queue.SimpleQueue[pb.StreamRequest | None] = queue.SimpleQueue()

    def create(self, workers: list[Worker]) -> None:
        """Opens the session, and finds out in which worker it is."""
        before = {worker: worker.streams() for worker in workers}
        self._call = self._stub.Stream(iter(self._requests.get, None), timeout=WAIT_S)
        attach = pb.AttachSession(handle=1, mode=pb.AttachSession.MODE_CREATE, model="lstm", session_id=self.session_id)
        assert self._ask(pb.StreamRequest(attach=attach)).WhichOneof("kind") == "attached"
        [self.worker] = [worker for worker in workers if worker.streams() == before[worker] + 1]

    def step(self, x: np.ndarray) -> np.ndarray:
        """One time step `[*shape]`."""
        self.seq += 1
        step = pb.Step(handle=1, seq=self.seq, inputs=[encode(x[None])])
        return decode(self._ask(pb.StreamRequest(step=step)).result.outputs[0])[0]

    def resume(self, session_id: str) -> str:
        """Tries to resume a session, and returns the reason why not."""
        attach = pb.AttachSession(handle=2, mode=pb.AttachSession.MODE_RESUME, session_id=session_id)
        return from_status(self._ask(pb.StreamRequest(attach=attach)).error.status).reason_name

    def sessions(self) -> list[pb.SessionInfo]:
        """All that the worker has."""
        return list(self._stub.ListSessions(pb.ListSessionsRequest()).sessions)

    def sent_away(self) -> tuple[list[str], grpc.StatusCode]:
        """Waits for GoAway and half-closes upon it; what came until the end, and the status of the stream."""
        kinds = []
        for reply in self._call:
            kinds.append(reply.WhichOneof("kind"))
            if kinds[-1] == "go_away":
                self._requests.put(None)
        return kinds, self._call.code()

    def ending(self) -> grpc.StatusCode:
        """The status of a stream that is broken off."""
        with pytest.raises(grpc.RpcError):
            next(self._call)
        return self._call.code()

    def close(self) -> None:
        self._requests.put(None)
        self.channel.close()

    def _ask(self, request: pb.StreamRequest) -> pb.StreamResponse:
        self._requests.put(request)
        return next(self._call)


@pytest.fixture
def connect() -> Iterator[Callable[[Group, list[Worker]], list[Client]]]:
    """Connects clients until each worker has one, and returns them all."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def until_all(group: Group, workers: list[Worker]) -> list[Client]:
            clients: list[Client] = []
            # By the kernel's choice; that 64 all miss one of two has a chance of one in 10^19.
            while {client.worker for client in clients} != set(workers):
                assert len(clients) < 64, "a worker got no connection"
                clients.append(Client(group, f"s{next(numbers)}"))
                stack.callback(clients[-1].close)
                clients[-1].create(workers)
            return clients

        yield until_all


def refused(command: list[str]) -> str:
    """What a server says that does not start; all that it started is gone."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("conveyor serve: ")]
    return line


@pytest.mark.usefixtures("transport")
def test_two_workers_serve_one_port_and_drain_in_order(start_workers, connect, nets) -> None:
    group = start_workers("--drain-s", "30")
    workers = group.workers()
    clients = connect(group, workers)
    assert sum(worker.streams() for worker in workers) == len(clients)
    truth = nets.truth("lstm", X)
    for client in clients:
        for x, y in zip(X, truth, strict=True):
            assert np.abs(client.step(x) - y).max() < 1e-5
    one, other = (next(client for client in clients if client.worker == worker) for worker in workers)
    assert other.resume(one.session_id) == "SESSION_NOT_FOUND", "it is in the worker that its connection reached"
    assert [session.session_id for session in other.sessions()] == [
        client.session_id for client in clients if client.worker == other.worker
    ]
    group.process.send_signal(signal.SIGTERM)
    for client in clients:
        assert client.sent_away() == (["go_away", "detached", "end"], grpc.StatusCode.OK)
    assert group.process.wait(WAIT_S) == 0
    group.gone()


@pytest.mark.usefixtures("transport")
def test_a_worker_that_is_killed_is_replaced(start_workers, connect, nets) -> None:
    group = start_workers()
    workers = group.workers()
    clients = connect(group, workers)
    lost, kept = (next(client for client in clients if client.worker == worker) for worker in workers)
    truth = nets.truth("lstm", X)
    for client in (lost, kept):
        assert np.abs(client.step(X[0]) - truth[0]).max() < 1e-5
    os.kill(lost.worker.pid, signal.SIGKILL)
    assert lost.ending() == grpc.StatusCode.UNAVAILABLE
    replacement = Worker(*map(int, group.heard(_READY, 3)[2].groups()))
    assert replacement.index == lost.worker.index
    assert replacement.pid != lost.worker.pid
    assert group.heard(rf"worker {replacement.index} was ended by SIGKILL: its sessions are lost")
    again = connect(group, [replacement, kept.worker])
    for client in again:
        assert client.resume(lost.session_id) == "SESSION_NOT_FOUND", "never begun again from zeros"
    assert np.abs(kept.step(X[1]) - truth[1]).max() < 1e-5
    for client in [*clients, *again]:
        client.close()
    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(WAIT_S) == 0


def test_a_worker_that_is_told_to_stop_drains_and_is_replaced(start_workers) -> None:
    group = start_workers()
    worker = group.workers()[0]
    os.kill(worker.pid, signal.SIGTERM)
    group.heard(f"worker {worker.index}: stopped")
    assert int(group.heard(_READY, 3)[2][1]) == worker.index
    assert group.heard(rf"worker {worker.index} ended with status 0: .* another one is started")


def test_a_supervisor_that_is_killed_leaves_nobody(start_workers, connect) -> None:
    group = start_workers()
    workers = group.workers()
    port = group.port
    clients = connect(group, workers)
    ends = [os.pidfd_open(worker.pid) for worker in workers]
    group.process.kill()
    for client in clients:
        assert client.sent_away() == (["go_away", "detached", "end"], grpc.StatusCode.OK), "also then it drains"
    group.gone()
    for end in ends:
        assert select.select([end], [], [], WAIT_S)[0]
        os.close(end)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_told_to_stop_while_the_workers_start(start_workers) -> None:
    group = start_workers()
    group.heard("workers share grpc on")
    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(WAIT_S) == 0
    group.gone()
    assert not any(re.search("Traceback|ERROR", line) for line in group.lines), "".join(group.lines)


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "would share"])
def test_a_port_of_someone_else_is_refused(nets, shares) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=shares) as taken:
        port = taken.getsockname()[1]
        line = refused(command(nets.folder, "--port", str(port)))
        assert line == f"conveyor serve: cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_another_server_is_refused_the_port(start_workers, nets, workers) -> None:
    group = start_workers()
    group.workers()
    line = refused(command(nets.folder, "--port", str(group.port), "--workers", workers))
    assert f"cannot listen on 127.0.0.1:{group.port}: " in line


def test_what_keeps_workers_from_starting_is_told_once(tmp_path) -> None:
    line = refused(command(tmp_path / "nothing"))
    assert "cannot read the models' folder" in line


def test_each_worker_has_a_metrics_port_by_its_index(tmp_path) -> None:
    first, second = neighbours()
    with second:
        first.close()
        port = second.getsockname()[1]
        line = refused(command(tmp_path, "--metrics-port", str(port - 1)))
    assert line == f"conveyor serve: cannot listen on 127.0.0.1:{port} for metrics: Address already in use"


def neighbours() -> tuple[socket.socket, socket.socket]:
    """Two ports beside each other, taken."""
    while True:
        second = socket.create_server(("127.0.0.1", 0))
        try:
            return socket.create_server(("127.0.0.1", second.getsockname()[1] - 1)), second
        except OSError:
            second.close()
