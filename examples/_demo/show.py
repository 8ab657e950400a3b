"""What the demo prints, with a terminal and without one."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_BLOCKS = "▁▂▃▄▅▆▇█"
_TEXT_COLUMNS = 88
# Without a terminal, a bar is so many lines.
_PLAIN_LINES = 10

if isinstance(sys.stdout, io.TextIOWrapper):
    # A terminal of another alphabet shows a `?`, and the demo goes on.
    sys.stdout.reconfigure(errors="replace")

console = Console(highlight=False, soft_wrap=True)


class Report(Protocol):
    """Called after each training step with the step and what to say of it."""

    def __call__(self, step: int, text: str) -> None: ...


def title(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def say(text: str = "") -> None:
    console.print(text)


@contextmanager
def progress(what: str, steps: int) -> Iterator[Report]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:

        def line(step: int, text: str) -> None:
            if step % max(1, steps // _PLAIN_LINES) == 0:
                print(f"  {what}: step {step} of {steps}, {text}", flush=True)

        yield line
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=steps, text="")

        def advance(step: int, text: str) -> None:
            bar.update(task, completed=step, text=text)

        yield advance


class Typewriter:
    """Prints text as it comes, character by character, broken between words."""

    def __init__(self) -> None:
        self._column = 0

    def write(self, text: str) -> None:
        for character in text:
            if character == "\n" or (character == " " and self._column >= _TEXT_COLUMNS):
                self._put("\n  ")
                self._column = 0
            else:
                self._put(character)
                self._column += 1

    def start(self) -> None:
        self._put("\n  ")

    def end(self) -> None:
        self._put("\n\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def sparkline(values: NDArray[np.float64], low: float, high: float) -> str:
    """One block for each value, from `low` to `high`."""
    steps = (values - low) / max(high - low, 1e-12) * (len(_BLOCKS) - 1)
    return "".join(_BLOCKS[int(step)] for step in np.clip(np.rint(steps), 0, len(_BLOCKS) - 1))


def bars(rows: Sequence[tuple[str, float]], width: int = 40) -> list[str]:
    """One line for each row, its bar as long as its share of the largest; rows of 0 are left out."""
    rows = [(label, value) for label, value in rows if value]
    largest = max((value for _, value in rows), default=1.0)
    widest = max((len(label) for label, _ in rows), default=0)
    return [
        f"  {label:>{widest}}  {'█' * max(1, round(value / largest * width))} {value:,.0f}" for label, value in rows
    ]
