"""What the small measurements have in common: a command line, a verdict for each goal, and a JSON file.

Invariant: a goal is printed with the figure that met it or did not, and the exit status says only whether the program
could measure.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conveyor.bench import LoadResult

from benchmarks.machine import describe_machine
from benchmarks.stage import say

OUT = Path(__file__).parent / "out"


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """One of the figures to reach.

    Attributes:
        text: what is wanted, and what was seen.
        met: whether it was.
    """

    text: str
    met: bool

    def __str__(self) -> str:
        """A line of the report."""
        return f"{'PASS ' if self.met else 'below'}  {self.text}"


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What a program measured.

    Attributes:
        figures: for the JSON file.
        goals: in the order in which they are printed.
    """

    figures: dict[str, Any]
    goals: Sequence[Goal]


def run(
    name: str,
    doc: str | None,
    measure: Callable[[argparse.Namespace], Findings],
    *,
    add: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses, measures, prints the goals, writes OUT/NAME.json; returns the exit status.

    Args:
        name: of the program, as in `python -m benchmarks.NAME`.
        doc: of its module.
        measure: gets what the command line says: `quick`, `out`, and what `add` has added.
        add: adds arguments of the program's own.
        arguments: the command line; None: sys.argv.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="does it work, not how fast is it")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON file and plots (%(default)s)")
    add(parser)
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ended from outside, the program still ends its processes in order.
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    given.out.mkdir(parents=True, exist_ok=True)
    found = measure(given)
    for goal in found.goals:
        print(goal)
    report = {
        "machine": describe_machine(),
        "quick": given.quick,
        "figures": found.figures,
        "goals": [dataclasses.asdict(goal) for goal in found.goals],
    }
    path = given.out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {os.path.relpath(path)}")
    return 0


def figures_of(result: LoadResult) -> dict[str, Any]:
    """A load's result for the JSON file."""
    return {
        "elapsed_s": result.elapsed_s,
        "steps": result.steps,
        "steps_per_s": result.steps_per_s,
        "latency": dataclasses.asdict(result.latency.percentiles()),
        "refused": {
            reason: {"count": took.count, **dataclasses.asdict(took.percentiles())}
            for reason, took in sorted(result.refused.items())
        },
        "unsent": result.unsent,
        "shed": result.shed,
        "fewest": int(result.served.min()),
        "most": int(result.served.max()),
        "client_cores": result.client_cpu_s / result.elapsed_s,
    }
