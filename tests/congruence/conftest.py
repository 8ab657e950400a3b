"""Exported models of every kind, and the server's core over them, without a wire."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
import torch
from conveyor_export import export
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.runner.onnx_runner import open_runner
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Session, Submission
from torch import nn

KINDS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
FEATURES, HIDDEN, CLASSES = 6, 24, 5


class Net(nn.Module):
    """What a stranger writes: the state is made inside forward."""

    def __init__(self, kind: str, layers: int) -> None:
        super().__init__()
        if kind.startswith("rnn"):
            self.rnn = nn.RNN(FEATURES, HIDDEN, layers, nonlinearity=kind[4:], batch_first=True)
        else:
            self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](FEATURES, HIDDEN, layers, batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(x)
        return self.head(y)


@dataclass
class Model:
    """A module, its exported file, and a core that serves it."""

    kind: str
    net: Net
    path: Path
    core: "Core"

    def truth(self, x: np.ndarray) -> np.ndarray:
        """PyTorch's answer to one whole sequence `[time, features]`."""
        with torch.no_grad():
            return self.net(torch.from_numpy(x)[None])[0].numpy()


class Core:
    """One engine and its sessions; `run` takes one batch."""

    def __init__(self, path: Path) -> None:
        limits = EngineLimits(max_batch=8, quantum=4, max_batch_time_steps=32)
        runner = open_runner(path, device="cpu", threads=1, capacity=limits.capacity(64))
        self.engine = Engine(runner, model="m", version="1", limits=limits)
        self.directory = Directory(SessionLimits(max_sessions=64, default_in_flight=64, pipeline_queue_s=math.inf))
        self.batches: list[list[int]] = []

    def start_over(self) -> None:
        """Closes what an earlier example left open: hypothesis draws within a test, and may abandon it there."""
        while self.run():
            pass
        self.directory.take_events()
        for session in list(self.directory.sessions.values()):
            self.close(session)

    def open(self) -> Session:
        return self.directory.create(self.engine, 0.0)

    def send(self, session: Session, x: np.ndarray) -> None:
        submission = Submission(session.accepted_seq + 1, session, inputs=[x], length=len(x), fingerprint=1)
        self.directory.submit(session, submission, 0.0)

    def run(self) -> bool:
        batch = self.engine.next_batch(0.0)
        if batch is None:
            return False
        self.batches.append(list(batch.shares))
        self.directory.deliver(self.engine, batch, self.engine.run(batch), 0.0)
        return True

    def collect(self, into: dict[str, list[np.ndarray]]) -> None:
        for event in self.directory.take_events():
            assert isinstance(event, Answer)
            assert event.fault is None, event.fault
            into.setdefault(event.session.id, []).append(event.outputs[0])

    def alone(self, x: np.ndarray, sizes: list[int]) -> np.ndarray:
        """The answer to `x` sent in chunks of these sizes by a session that is alone in every batch."""
        session = self.open()
        answers: dict[str, list[np.ndarray]] = {}
        start = 0
        for size in sizes:
            self.send(session, x[start : start + size])
            start += size
            while self.run():
                pass
        self.collect(answers)
        self.close(session)
        return np.concatenate(answers[session.id])

    def close(self, session: Session) -> None:
        self.directory.close(session, None, 0.0)
        self.directory.take_events()


@pytest.fixture(scope="session", params=[(kind, layers) for kind in KINDS for layers in (1, 3)], ids=str)
def model(request, tmp_path_factory) -> Model:
    kind, layers = request.param
    torch.set_num_threads(1)
    torch.manual_seed(7)
    net = Net(kind, layers).eval()
    folder = tmp_path_factory.mktemp(f"{kind}{layers}") / "m" / "1"
    export(net, torch.zeros(2, 5, FEATURES), folder, quiet=True)
    path = folder / "model.onnx"
    return Model(kind, net, path, Core(path))
