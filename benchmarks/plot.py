"""The report as pictures: how much a second of the server's CPU gives, and how long an answer takes.

Invariant: what is drawn are the medians of the table, and void figures are drawn pale.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt  # the backend is chosen before

from benchmarks.cases import Client, Target
from benchmarks.report import Row, Spread

_CONVEYOR, _ECHO, _BARE = "#1f6f8b", "#b8b8b8", "#d1495b"
_CONVEYOR_LABEL, _ECHO_LABEL = "Conveyor, model included", "bare grpc.aio echo, no model"
_PALE = 0.35


def draw(rows: Sequence[Row], folder: Path, footer: str) -> list[Path]:
    """Writes throughput.png and latency.png into the folder; `footer` says where and when."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "throughput.png", folder / "latency.png"]
    for path, paint in zip(paths, (_throughput, _latency), strict=True):
        figure = paint(rows)
        if not all(row.tokens_per_s.counted for row in rows):
            figure.text(0.01, 0.01, "pale: the machine was not free in any round", fontsize=7, color=_BARE)
        figure.text(0.99, 0.01, footer, ha="right", va="bottom", fontsize=7, color="#666666")
        figure.savefig(path, dpi=140)
        plt.close(figure)
    return paths


def _throughput(rows: Sequence[Row]) -> Any:
    """Two panels, because a frame carries what 256 messages carry."""
    framed = [row for row in rows if row.case.client in {Client.FRAMES, Client.SDK}]
    single = [row for row in rows if row.case.client is Client.MESSAGES]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), height_ratios=(3, 5))
    figure.set_layout_engine("constrained", rect=(0, 0.025, 1, 0.975))
    figure.suptitle("Tokens for one second of the server's CPU", fontweight="bold")
    _bars(top, [row for row in framed if row.case.target is Target.CONVEYOR], [], "columnar frames")
    ceiling = max((row for row in rows if row.case.target is Target.BARE), key=lambda row: row.case.sessions)
    value = ceiling.tokens_per_server_cpu_s.median
    top.axvline(value, color=_BARE, linewidth=2)
    text = f"onnxruntime bare, {ceiling.case.label}: {value:,.0f} "
    top.text(value, -0.75, text, color=_BARE, ha="right", fontsize=8)
    top.set_xlim(0, value * 1.12)
    conveyor = [row for row in single if row.case.target is Target.CONVEYOR]
    echo = {row.case.name: row for row in single if row.case.target is Target.ECHO}
    _bars(bottom, conveyor, [echo[row.case.echo] for row in conveyor], "one token per message")
    _legend(bottom)
    return figure


def _bars(axes: Any, rows: Sequence[Row], twins: Sequence[Row], title: str) -> None:
    height = 0.38 if twins else 0.6
    groups = [(rows, _CONVEYOR, _CONVEYOR_LABEL, -height / 2 if twins else 0.0)]
    if twins:
        groups.append((twins, _ECHO, _ECHO_LABEL, height / 2))
    for group, color, label, offset in groups:
        for place, row in enumerate(group):
            spread = row.tokens_per_server_cpu_s
            axes.barh(
                place + offset,
                spread.median,
                height,
                color=color,
                alpha=_alpha(spread),
                label=label if not place else None,
                xerr=_errors(spread),
                error_kw={"ecolor": "#444444", "elinewidth": 0.8, "capsize": 2},
            )
            axes.text(spread.high, place + offset, f"  {spread.median:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.case.label for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _latency(rows: Sequence[Row]) -> Any:
    """Median and 99th percentile of each load, Conveyor beside the echo."""
    conveyor = [row for row in rows if row.case.target is Target.CONVEYOR]
    echo = {row.case.name: row for row in rows if row.case.target is Target.ECHO}
    figure, axes = plt.subplots(figsize=(9, 5))
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))
    for place, row in enumerate(conveyor):
        for item, color, offset in ((row, _CONVEYOR, -0.16), (echo.get(row.case.echo), _ECHO, 0.16)):
            if item is None or (row.case.client is Client.SDK and item is not row):
                continue
            low, high = item.p50_ms.median, item.p99_ms.median
            alpha = _alpha(item.p50_ms)
            axes.plot([low, high], [place + offset] * 2, color=color, linewidth=3, alpha=alpha, solid_capstyle="round")
            axes.plot(low, place + offset, "o", color=color, markersize=7, alpha=alpha)
            axes.plot(high, place + offset, "|", color=color, markersize=11, markeredgewidth=2.5, alpha=alpha)
            axes.text(high * 1.09, place + offset, f"{low:.2f} / {high:.2f}", va="center", fontsize=8, color="#444444")
    axes.plot([], [], "o-", color=_CONVEYOR, label=_CONVEYOR_LABEL)
    axes.plot([], [], "o-", color=_ECHO, label=_ECHO_LABEL)
    _legend(axes)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds, log scale: dot = median, bar = 99th percentile", fontsize=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(conveyor)), [row.case.label for row in conveyor])
    axes.invert_yaxis()
    axes.grid(axis="x", which="major", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Round trip of one message under full load", fontweight="bold")
    return figure


def _legend(axes: Any) -> None:
    """Above the axes, where nothing is drawn."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0)


def _alpha(spread: Spread) -> float:
    return 1.0 if spread.counted else _PALE


def _errors(spread: Spread) -> list[list[float]]:
    return [[spread.median - spread.low], [spread.high - spread.median]]
