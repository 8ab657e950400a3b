"""Forecasts of weeks that the model was not trained on, beside what was measured."""

from datetime import date, timedelta

import conveyor
import numpy as np
import torch
from rich.table import Table

from examples import co2
from examples._demo import show

TABLE_WEEKS = 8
SPARKLINE_WEEKS = 78


def stream_forecast(client: conveyor.Client, network: co2.Forecaster) -> float:
    """Prints forecasts beside the truth; returns the largest difference from PyTorch over the whole sequence."""
    ppm = co2.series().numpy()
    held_out = len(ppm) - co2.HELD_OUT_WEEKS
    with client.session("co2") as session:
        # All weeks until the first forecast that counts in one chunk; then week by week, as readings come.
        history = session.step(ppm[:held_out])
        streamed = np.concatenate([history, list(session.stream(ppm[held_out:-1]))])

    truth, forecast, naive = ppm[held_out:], streamed[held_out - 1 :], ppm[held_out - 1 : -1]
    error, naive_error = np.abs(forecast - truth), np.abs(naive - truth)
    show.console.print(_table(truth, forecast, error, naive_error, held_out))
    show.say()
    low, high = truth[-SPARKLINE_WEEKS:].min(), truth[-SPARKLINE_WEEKS:].max()
    show.say(f"  measured  {show.sparkline(truth[-SPARKLINE_WEEKS:], low, high)}")
    show.say(f"  forecast  {show.sparkline(forecast[-SPARKLINE_WEEKS:], low, high)}")
    show.say(f"            the last {SPARKLINE_WEEKS} weeks, {low:.1f} to {high:.1f} ppm\n")
    gain = 1 - error.mean() / naive_error.mean()
    show.say(
        f"  mean error over {len(truth)} held-out weeks: {error.mean():.3f} ppm, "
        f"{naive_error.mean():.3f} ppm for 'as last week': {abs(gain):.0%} {'less' if gain > 0 else 'MORE'}"
    )
    with torch.no_grad():
        whole = network(torch.from_numpy(ppm[np.newaxis, :-1]))[0].numpy()
    return float(np.abs(streamed - whole).max())


def _table(truth: co2.Ppm, forecast: co2.Ppm, error: co2.Ppm, naive_error: co2.Ppm, held_out: int) -> Table:
    table = Table("week", box=None, pad_edge=False, padding=(0, 0, 0, 2))
    for column in ("measured ppm", "forecast", "error", "as last week"):
        table.add_column(column, justify="right")
    for week in range(len(truth) - TABLE_WEEKS, len(truth)):
        day: date = co2.FIRST_WEEK + timedelta(weeks=held_out + week)
        numbers = (truth[week], forecast[week], error[week], naive_error[week])
        table.add_row(day.isoformat(), *(f"{number:.2f}" for number in numbers))
    return table
