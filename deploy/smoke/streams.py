"""Sessions that are streamed to through Envoy while a server is killed, beside the same on one that nobody disturbs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conveyor
import conveyor_export
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MODEL = "smoke"
SESSIONS = 24
STEPS = 60
# Steps that are answered before a server is killed; the rest comes after.
FIRST = 30
_FEATURES = 4
_PATIENCE_S = 120.0

Answers = NDArray[np.float32]


class Tagger(nn.Module):
    """Untrained: what counts is that its answers depend on all that a session has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_FEATURES, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """What the LSTM makes of `[batch, time, features]`."""
        y: Tensor = self.lstm(x)[0]
        return y


def export(models: Path) -> None:
    """Leaves the model in a folder that any user can read."""
    torch.manual_seed(0)
    conveyor_export.export(Tagger().eval(), torch.zeros(1, 5, _FEATURES), models / MODEL / "1", quiet=True)
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def inputs() -> NDArray[np.float32]:
    """`[SESSIONS, STEPS, features]`."""
    return np.random.default_rng(0).standard_normal((SESSIONS, STEPS, _FEATURES), dtype=np.float32)


def undisturbed(target: str) -> Answers:
    """`[SESSIONS, STEPS, features]`, of one server, one session after the other."""
    with conveyor.connect(target) as client:
        answers = []
        for rows in inputs():
            with client.session(MODEL) as session:
                answers.append(np.stack([session.step(row) for row in rows]))
    return np.stack(answers)


class Crowd:
    """SESSIONS sessions, a thread and a connection each. They stop halfway until they are told to go on.

    Args:
        target: of Envoy.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._half = threading.Barrier(SESSIONS + 1)
        self._on = threading.Event()
        self._pool = ThreadPoolExecutor(SESSIONS)
        self._running = [self._pool.submit(self._one, index, rows) for index, rows in enumerate(inputs())]

    def wait_half(self) -> None:
        """Returns when FIRST steps of every session are answered; all sessions are open then."""
        self._half.wait(_PATIENCE_S)

    def go_on(self) -> None:
        """Lets all sessions take their other steps."""
        self._on.set()

    def finish(self) -> Answers:
        """`[SESSIONS, STEPS, features]`, once all are answered."""
        answers = np.stack([one.result(_PATIENCE_S) for one in self._running])
        self._pool.shutdown()
        return answers

    def _one(self, index: int, rows: NDArray[np.float32]) -> Answers:
        try:
            with (
                conveyor.connect(self._target) as client,
                client.session(MODEL, session_id=f"smoke-{index}", durability="async") as session,
            ):
                first = [session.step(row) for row in rows[:FIRST]]
                self._half.wait(_PATIENCE_S)
                self._on.wait(_PATIENCE_S)
                # One after the other: each is sent when the one before it is answered.
                return np.stack([*first, *(session.step(row) for row in rows[FIRST:])])
        except BaseException:
            # Whoever waits for half of the steps would wait for ever.
            self._half.abort()
            raise
