r"""A one-step forecaster of carbon dioxide in the air: weekly ppm in, the next week's ppm out.

Everything a forecast needs is inside the module, normalising included, so that an app sends the reading as it comes
and gets ppm back. The state is made inside `forward`: the GRU's, and the last reading that the differences need.

    conveyor export examples.co2:model --weights co2.pt --example examples.co2:example --tolerance 1e-4 \
        --out models/co2/1
"""

from collections.abc import Callable
from datetime import date
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from statsmodels.datasets import co2
from torch import Tensor, nn
from torch.nn import functional

Ppm: TypeAlias = NDArray[np.float32]
FIRST_WEEK = date(1958, 3, 29)

STEPS = 320
BATCH = 32
WEEKS = 156
WARM_UP = 52
HELD_OUT_WEEKS = 416


class Forecaster(nn.Module):
    """`[batch, time]` float32 ppm in, the forecast for the following week out, in the same shape and unit."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.change = nn.Conv1d(1, 1, kernel_size=2, bias=False)
        self.change.weight = nn.Parameter(torch.tensor([[[-1.0, 1.0]]]), requires_grad=False)
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, ppm: Tensor) -> Tensor:
        change = self.change(functional.pad(ppm.unsqueeze(1), (1, 0))).transpose(1, 2)
        # A session's first change is from nothing to some 300 ppm: tanh makes it a 1, and a week's change linear.
        hidden, _ = self.gru(torch.tanh(change))
        forecast: Tensor = ppm + self.head(hidden).squeeze(2)
        return forecast


def model() -> Forecaster:
    """The factory that `conveyor export` calls."""
    return Forecaster()


def example() -> tuple[Tensor]:
    """Inputs of the kind that the model will see, for the exporter's verifier."""
    return (series()[:WEEKS].unsqueeze(0),)


@cache
def series() -> Tensor:
    """Mauna Loa, weekly, 1958 to 2001: `[time]` float32 ppm. A missing week keeps the reading before it."""
    ppm = co2.load_pandas().data["co2"].ffill()
    return torch.tensor(ppm.to_numpy(), dtype=torch.float32)


def train(network: Forecaster, progress: Callable[[int, float], None]) -> None:
    """Trains in place on random windows; `progress(step, mean squared error in ppm²)` is called after each step."""
    seen = series()[:-HELD_OUT_WEEKS]
    network.train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(p for p in network.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        starts = torch.randint(len(seen) - WEEKS - 1, (BATCH, 1), generator=generator)
        window = seen[starts + torch.arange(WEEKS + 1)]
        forecast = network(window[:, :-1])
        loss = functional.mse_loss(forecast[:, WARM_UP:], window[:, 1 + WARM_UP :])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
