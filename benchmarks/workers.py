"""`make bench-workers`: the closed loop of 256 sessions against one, two and more workers of one server, in turns.

Workers are processes that share the port; the kernel spreads connections over them, and each has sessions, batches and
models of its own. On a machine whose cores are taken, more of them must do no harm; with cores to spare, they add up.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from conveyor.bench import Load, LoadResult, LoadSpec

from benchmarks.program import Findings, Goal, figures_of, run
from benchmarks.stage import MODEL, say, stage

# More workers than one may cost that much of the throughput: batches are smaller, and the cores are shared.
_HARMLESS = 0.90
_FORMS = {
    "streams": ("256 streams on 32 connections", LoadSpec(model=MODEL, sessions=256, streams=256, connections=32)),
    "frames": (
        "frames of 256 sessions on 8 streams",
        LoadSpec(model=MODEL, sessions=256, streams=8, connections=8, frames=True),
    ),
}


def judge(label: str, rates: dict[int, float]) -> list[Goal]:
    """More workers do no harm: at least 90 % of what one does."""
    return [
        Goal(
            f"{label}: {workers} workers answer {rate:,.0f} steps/s, {rate / rates[1]:.2f} of one worker's "
            f"{rates[1]:,.0f}",
            rate >= _HARMLESS * rates[1],
        )
        for workers, rate in sorted(rates.items())
        if workers > 1
    ]


def measure(settings: argparse.Namespace) -> Findings:
    """Servers of all sizes stand beside each other, and one at a time has the load."""
    seconds, rounds = (0.3, 1) if settings.quick else (settings.seconds, settings.rounds)
    counts = range(1, max(2, settings.most) + 1)
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    goals: list[Goal] = []
    with stage() as on:
        say(f"starting servers of 1 to {counts[-1]} workers")
        # Each worker has a metrics port of its own; 0 lets each take one that is free.
        servers = {count: on.serve("--workers", str(count), "--metrics-port", "0") for count in counts}
        for name, (label, spec) in _FORMS.items():
            loads = {count: Load(server.address, spec) for count, server in servers.items()}
            results: dict[int, list[LoadResult]] = {count: [] for count in counts}
            try:
                for load in loads.values():
                    load.open()
                for _ in range(rounds):
                    for count, load in loads.items():
                        load.tend()
                        results[count].append(load.run(seconds))
            finally:
                for load in loads.values():
                    load.close()
            rates = {count: statistics.median(result.steps_per_s for result in of) for count, of in results.items()}
            for count, of in results.items():
                p99_ms = statistics.median(result.latency.percentiles().p99_s for result in of) * 1e3
                print(f"{label}: {count} workers: {rates[count]:9,.0f} steps/s, p99 {p99_ms:.2f} ms", flush=True)
            figures[name] = {count: [figures_of(result) for result in of] for count, of in results.items()}
            goals += judge(label, rates)
    return Findings(figures, goals)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--most", type=int, default=os.cpu_count() or 2, help="most workers, 2 at least (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each size, in turns (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("workers", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
