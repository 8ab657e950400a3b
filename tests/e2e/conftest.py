"""The real server as a process, real exported models, and a proxy that cuts connections."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import grpc
import numpy as np
import pytest
import torch
from conveyor_export import export
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

FEATURES = 4


class Tagger(nn.Module):
    """A recurrent layer and a head; the state is made inside forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](FEATURES, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class Speller(nn.Module):
    """Token ids in: an id past the embedding makes the run itself fail."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.embedding(token))[0]


@dataclass
class Nets:
    """The modules behind the served models, for the truth."""

    folder: Path
    modules: dict[str, nn.Module]

    def truth(self, name: str, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.modules[name](torch.from_numpy(x)[None])[0].numpy()


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models")
    modules: dict[str, nn.Module] = {kind: Tagger(kind).eval() for kind in ("lstm", "gru", "rnn")}
    modules["speller"] = Speller().eval()
    for name, module in modules.items():
        example = torch.zeros(2, 3, dtype=torch.int64) if name == "speller" else torch.zeros(2, 3, FEATURES)
        export(module, example, folder / name / "1", quiet=True)
    return Nets(folder, modules)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    log: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def wait_serving(server: Server, timeout_s: float = 60.0) -> None:
    """Follows grpc.health.v1 until the server serves."""
    with grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        for reply in stub.Watch(request, timeout=timeout_s, wait_for_ready=True):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return
    raise AssertionError(f"the server ended its health stream:\n{server.log.read_text()}")


StartServer = Callable[..., Server]


def launch(models: Path, folder: Path, *flags: str) -> Server:
    """Starts a server on free loopback ports; every warning in it is an error."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-W", "error", "-m", "conveyor_server", "--models", str(models)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(metrics_port), *flags]
    log = folder / f"server-{port}.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, text=True)
    return Server(process, port, metrics_port, log)


@contextlib.contextmanager
def serving(models: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """A server that serves, and is killed at the end if it still runs."""
    server = launch(models, folder, *flags)
    try:
        wait_serving(server)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)


@pytest.fixture(scope="module", params=["cq", "aio"])
def transport(request: pytest.FixtureRequest) -> str:
    """Whoever asks for it runs with each of the server's transports."""
    return request.param


@pytest.fixture
def start_server(request: pytest.FixtureRequest, nets: Nets, tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that are gone at the end of the test: on the default transport, or on the test's `transport`."""
    chosen = ()
    if "transport" in request.fixturenames:
        chosen = ("--transport", request.getfixturevalue("transport"))
    with contextlib.ExitStack() as stack:
        yield lambda *flags: stack.enter_context(serving(nets.folder, tmp_path, *chosen, *flags))


class Cutter:
    """A TCP proxy on loopback whose connections can be reset at any moment."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.cuts = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Cutter"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut_all()
            await server.wait_closed()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Resets every connection, whatever is on its way."""
        for pair in list(self._pairs):
            for writer in pair:
                writer.transport.abort()
            self.cuts += 1

    def cut_some(self, chance: random.Random) -> None:
        """Resets about a third of the connections, at least one."""
        pairs = list(self._pairs)
        for pair in chance.sample(pairs, min(len(pairs), 1 + len(pairs) // 3)):
            for writer in pair:
                writer.transport.abort()
            self.cuts += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, up_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(_pipe(reader, up_writer), _pipe(up_reader, writer))
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.transport.abort()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
def make_cutter() -> Callable[[int], Cutter]:
    return Cutter
