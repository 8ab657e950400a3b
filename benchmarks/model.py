"""The models that the bench steps, written by the real exporter.

Run as a program of its own, so that torch and its threads are gone before anything is measured.
"""

import sys
from pathlib import Path

import torch
from conveyor_export import export
from torch import nn

from benchmarks.cases import GRU, LSTM

_SIZE, _HIDDEN = 64, 256
_TINY = 16


class Lstm(nn.Module):
    """An LSTM and a linear head, float32; the hidden and cell state are made inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_SIZE, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, _SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, time, 64]` to `[batch, time, 64]`."""
        y, _ = self.lstm(x)
        answer: torch.Tensor = self.head(y)
        return answer


class Gru(nn.Module):
    """A GRU so small that the wire is nearly all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(_TINY, _TINY, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, time, 16]` to `[batch, time, 16]`."""
        answer: torch.Tensor = self.gru(x)[0]
        return answer


def write_models(repository: Path) -> list[Path]:
    """Exports the seeded modules as version 1 of LSTM and GRU; returns the files."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    modules = {LSTM: (Lstm(), _SIZE), GRU: (Gru(), _TINY)}
    return [
        export(module, torch.randn(2, 8, size), repository / name / "1", quiet=True).path
        for name, (module, size) in modules.items()
    ]


if __name__ == "__main__":
    for path in write_models(Path(sys.argv[1])):
        print(path)
