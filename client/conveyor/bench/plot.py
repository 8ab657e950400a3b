"""A run's latencies as a picture: from the median to the rarest, each tenfold rarer one as far to the right."""

import importlib
import textwrap
from pathlib import Path

import numpy as np

from conveyor.bench.extra import needs_extra
from conveyor.bench.result import LoadResult

_TITLE_CHARACTERS = 110
_MARKS = (0.5, 0.9, 0.99, 0.999, 0.9999)


def check_installed() -> None:
    """Raises LoadError where matplotlib is not installed."""
    with needs_extra():
        importlib.import_module("matplotlib")


def draw(result: LoadResult, title: str, path: Path) -> None:
    """Writes the plot.

    Args:
        result: a run with answers.
        title: of the plot.
        path: `.png` or `.svg`.

    Raises:
        LoadError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    axes = figure.add_subplot()
    for label, histogram in [("answered", result.latency), *((f"refused: {k}", v) for k, v in result.refused.items())]:
        shares, seconds = histogram.curve()
        # The last value of all stands where one in so many would.
        rarity = 1 / np.maximum(1 - shares, 0.5 / max(1, histogram.count))
        axes.step(rarity, seconds * 1e3, where="post", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1 / (1 - mark) for mark in _MARKS], [f"{mark * 100:g} %" for mark in _MARKS])
    axes.set_xlabel("share of steps that took at most so long")
    axes.set_ylabel("milliseconds")
    axes.xaxis.minorticks_off()
    axes.set_title(textwrap.fill(title, _TITLE_CHARACTERS), fontsize=9)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path)
