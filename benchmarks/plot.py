"""The report as pictures: what a second of the server's CPU gives, how long an answer takes, and both over streams.

Invariant: what is drawn are the medians of the table, and void figures are drawn pale.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt  # the backend is chosen before

from benchmarks.cases import LSTM, SDK, Client, Target
from benchmarks.report import GroupReport, Row, Spread

_COLORS = {Target.FULL: "#1f6f8b", Target.NULL: "#74b3ce", Target.ECHO: "#b8b8b8", Target.CQ_ECHO: "#dcdcdc"}
_LABELS = {
    Target.FULL: "Full: model included",
    Target.NULL: "Null: sessions and scheduler",
    Target.ECHO: "Echo: the server's transport",
    Target.CQ_ECHO: "bare completion-queue echo",
}
_BARE = "#d1495b"
_PALE = 0.35


def draw(reports: Sequence[GroupReport], folder: Path, footer: str) -> list[Path]:
    """Writes throughput.png, latency.png and curve.png, as far as they were measured; `footer` says where and when."""
    folder.mkdir(parents=True, exist_ok=True)
    loads = [report for report in reports if report.row(Target.FULL) and report.group.name != "curve"]
    messages = [report for report in loads if report.rows[0].case.client is Client.MESSAGES]
    frames = [report for report in loads if _framed(report) and report.row(Target.BARE)]
    curve = [report for report in reports if report.group.name == "curve"]
    pictures: dict[str, tuple[Sequence[GroupReport], Callable[[], Any]]] = {
        "throughput.png": (frames + messages, lambda: _throughput(frames, messages)),
        "latency.png": (messages + frames, lambda: _latency(frames + messages)),
        "curve.png": (curve, lambda: _curve(curve[0])),
    }
    paths = []
    for name, (shown, paint) in pictures.items():
        if shown:
            figure = paint()
            if not all(row.tokens_per_s.counted for report in shown for row in report.rows):
                figure.text(0.01, 0.01, "pale: the machine was not free in any round", fontsize=7, color=_BARE)
            figure.text(0.99, 0.01, footer, ha="right", va="bottom", fontsize=7, color="#666666")
            figure.savefig(folder / name, dpi=140)
            plt.close(figure)
            paths.append(folder / name)
    return paths


def _framed(report: GroupReport) -> bool:
    return report.rows[0].case.frames and report.rows[0].case.model == LSTM


def _throughput(frames: Sequence[GroupReport], messages: Sequence[GroupReport]) -> Any:
    """Two panels, because a frame carries what 256 messages carry."""
    panels: list[tuple[Sequence[GroupReport], tuple[Target, ...], str]]
    panels = [(frames, (Target.FULL,), "columnar frames")] if frames else []
    if messages:
        panels.append((messages, tuple(_COLORS), "one token per message"))
    heights = [len(shown) * (0.35 * len(targets) + 0.3) + 0.8 for shown, targets, _ in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 1.2 + sum(heights)), height_ratios=heights, squeeze=False)
    figure.set_layout_engine("constrained", rect=(0, 0.025, 1, 0.975))
    figure.suptitle("Tokens for one second of the server's CPU", fontweight="bold")
    for place, (shown, targets, title) in enumerate(panels):
        _bars(axes[place][0], shown, targets, title)
    if frames:
        _ceiling(axes[0][0], frames)
    _legend(axes[-1][0])
    return figure


def _bars(axes: Any, reports: Sequence[GroupReport], targets: Sequence[Target], title: str) -> None:
    height = 0.8 / len(targets)
    for order, target in enumerate(targets):
        offset = (order - (len(targets) - 1) / 2) * height
        label: str | None = _LABELS[target]
        for place, report in enumerate(reports):
            row = report.row(target)
            if row is None:
                continue
            spread = row.tokens_per_server_cpu_s
            axes.barh(
                place + offset,
                spread.median,
                height * 0.94,
                color=_COLORS[target],
                alpha=_alpha(spread),
                label=label,
                xerr=_errors(spread),
                error_kw={"ecolor": "#444444", "elinewidth": 0.8, "capsize": 2},
            )
            label = None
            axes.text(spread.high, place + offset, f"  {spread.median:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(reports)), [report.group.label for report in reports])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _ceiling(axes: Any, frames: Sequence[GroupReport]) -> None:
    """What bare onnxruntime makes of the same batch."""
    bare = [row for row in (report.row(Target.BARE) for report in frames) if row]
    value = max(row.tokens_per_server_cpu_s.median for row in bare)
    axes.axvline(value, color=_BARE, linewidth=2)
    text = f"{bare[0].case.label}: {value:,.0f}"
    axes.text(value, 1.03, text, color=_BARE, ha="right", fontsize=8, transform=axes.get_xaxis_transform())
    axes.set_xlim(0, value * 1.12)


def _latency(reports: Sequence[GroupReport]) -> Any:
    """Median and 99th percentile of each load, Full beside Echo."""
    figure, axes = plt.subplots(figsize=(9, 1 + 0.55 * len(reports)))
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))
    for place, report in enumerate(reports):
        for target, offset in ((Target.FULL, -0.16), (Target.ECHO, 0.16)):
            row = report.row(target)
            if row is not None and not (row.case.client in SDK and target is Target.ECHO):
                _whisker(axes, row, place + offset, _COLORS[target])
    for target in (Target.FULL, Target.ECHO):
        axes.plot([], [], "o-", color=_COLORS[target], label=_LABELS[target])
    _legend(axes)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("milliseconds, log scale: dot = median, bar = 99th percentile", fontsize=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(reports)), [report.group.label for report in reports])
    axes.invert_yaxis()
    axes.grid(axis="x", which="major", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Round trip of one message under full load", fontweight="bold")
    return figure


def _whisker(axes: Any, row: Row, height: float, color: str) -> None:
    low, high, alpha = row.p50_ms.median, row.p99_ms.median, _alpha(row.p50_ms)
    axes.plot([low, high], [height] * 2, color=color, linewidth=3, alpha=alpha, solid_capstyle="round")
    axes.plot(low, height, "o", color=color, markersize=7, alpha=alpha)
    axes.plot(high, height, "|", color=color, markersize=11, markeredgewidth=2.5, alpha=alpha)
    axes.text(high * 1.09, height, f"{low:.2f} / {high:.2f}", va="center", fontsize=8, color="#444444")


def _curve(report: GroupReport) -> Any:
    """Tokens per second and round trips over the number of streams."""
    rows = report.rows
    streams = [row.case.streams for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))
    figure.suptitle(report.group.label, fontweight="bold")
    rates = [row.tokens_per_s for row in rows]
    alpha = min(map(_alpha, rates))
    errors = [[rate.median - rate.low for rate in rates], [rate.high - rate.median for rate in rates]]
    top.errorbar(
        streams, [rate.median for rate in rates], yerr=errors, marker="o", color=_COLORS[Target.FULL], alpha=alpha
    )
    top.set_ylabel("tokens/s")
    top.set_ylim(0)
    top.yaxis.set_major_formatter("{x:,.0f}")
    bottom.plot(
        streams, [row.p50_ms.median for row in rows], "o-", color=_COLORS[Target.FULL], alpha=alpha, label="median"
    )
    bottom.plot(
        streams, [row.p99_ms.median for row in rows], "o--", color=_COLORS[Target.NULL], alpha=alpha, label="p99"
    )
    bottom.set_xscale("log", base=2)
    bottom.set_yscale("log")
    bottom.set_xticks(streams, [str(count) for count in streams])
    bottom.set_xlabel("streams, each with one token on its way")
    bottom.set_ylabel("round trip, ms")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.legend(frameon=False, fontsize=8)
    for axes in (top, bottom):
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _legend(axes: Any) -> None:
    """Above the axes, where nothing is drawn."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0)


def _alpha(spread: Spread) -> float:
    return 1.0 if spread.counted else _PALE


def _errors(spread: Spread) -> list[list[float]]:
    return [[spread.median - spread.low], [spread.high - spread.median]]
