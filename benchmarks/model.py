"""The model that the bench steps: one LSTM layer between 64 inputs and 64 outputs, written by the real exporter.

Run as a program of its own, so that torch and its threads are gone before anything is measured.
"""

import sys
from pathlib import Path

import torch
from conveyor_export import export
from torch import nn

from benchmarks.cases import HIDDEN_SIZE, INPUT_SIZE, MODEL, OUTPUT_SIZE


class Lstm(nn.Module):
    """An LSTM and a linear head, float32; the hidden and cell state are made inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUT_SIZE, HIDDEN_SIZE, batch_first=True)
        self.head = nn.Linear(HIDDEN_SIZE, OUTPUT_SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, time, 64]` to `[batch, time, 64]`."""
        y, _ = self.lstm(x)
        answer: torch.Tensor = self.head(y)
        return answer


def write_model(repository: Path) -> Path:
    """Exports the seeded module as version 1 of MODEL; returns the file."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return export(Lstm(), torch.randn(2, 8, INPUT_SIZE), repository / MODEL / "1", quiet=True).path


if __name__ == "__main__":
    print(write_model(Path(sys.argv[1])))
