"""`make bench`: Conveyor beside its ceilings - its own transport alone, bare gRPC echoes and bare onnxruntime.

All in one run on one machine; server, echoes, load client and the bare loop are processes of their own, and only one
of those that answer works at a time.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import MIN_SESSIONS, Group, choose, groups
from benchmarks.goals import judge
from benchmarks.machine import describe_machine
from benchmarks.plot import draw
from benchmarks.report import GroupReport, report_of
from benchmarks.rig import export_models, rig
from benchmarks.segments import Plan, Segment, measure_group
from benchmarks.table import format_goals, format_ratios, format_rows, format_void

_OUT = Path(__file__).parent / "out"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    Attributes:
        plan: how much is measured.
        sessions: the largest population.
        only: shell patterns of groups; empty: all.
        transport: the server's; empty: all groups on cq, and the main ones on aio.
        out: folder of bench.json and the plots.
    """

    plan: Plan
    sessions: int
    only: tuple[str, ...]
    transport: str
    out: Path

    def tables(self) -> list[tuple[str, list[Group]]]:
        """Transports, and the groups that are measured on each."""
        wanted = [(self.transport, False)] if self.transport else [("cq", False), ("aio", True)]
        found = [(name, choose(groups(self.sessions, name, main=main), self.only)) for name, main in wanted]
        return [(name, chosen) for name, chosen in found if chosen]


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """What one transport gave."""

    transport: str
    reports: list[GroupReport]
    segments: list[Segment]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; returns the exit status."""
    settings = _parse(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ended from outside, the bench still ends its processes in order.
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="conveyor-bench-") as name:
        folder = Path(name)
        _say("exporting the models")
        export_models(folder / "models")
        tables = [_measure(folder, transport, chosen, settings.plan) for transport, chosen in settings.tables()]
    print(f"{machine['processor']}, {machine['cores']} cores; ", end="")
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name not in {"processor", "cores"}))
    for table in tables:
        _print(table, settings.plan)
    _write(tables, settings, machine)
    return 0


def _measure(folder: Path, transport: str, chosen: Sequence[Group], plan: Plan) -> Table:
    _say(f"starting server ({transport}), echoes, load client and bare loop")
    table = Table(transport, [], [])
    with rig(folder / "models", folder, transport) as processes:
        for group in chosen:
            _say(f"{transport}: {group.label}")
            segments = measure_group(processes, group, plan, _tell)
            table.segments.extend(segments)
            table.reports.append(report_of(group, segments))
    return table


def _print(table: Table, plan: Plan) -> None:
    rounds = plan.rounds
    print(f"\n== Transport {table.transport}: {rounds} rounds of {plan.seconds:g} s")
    print("Medians; server, client, others: cores in use; per stream: fewest-most messages answered\n")
    print(format_rows(table.reports, rounds))
    print("\nRatios of tokens per server CPU second, median (lowest-highest); *: the client was an echo's limit")
    print(format_ratios(table.reports, rounds))
    verdicts = judge(table.reports)
    if verdicts:
        print("\nGoals")
        print(format_goals(verdicts, rounds))
    print(f"\n{format_void(table.segments)}", flush=True)


def _write(tables: Sequence[Table], settings: Settings, machine: dict[str, Any]) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "settings": {**dataclasses.asdict(settings.plan), "sessions": settings.sessions, "only": settings.only},
        "tables": [
            {
                **dataclasses.asdict(table),
                "goals": [dataclasses.asdict(verdict) for verdict in judge(table.reports)],
            }
            for table in tables
        ],
    }
    path = settings.out / "bench.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written = [path]
    if tables:
        footer = f"{machine['processor']}, {machine['cores']} cores, {machine['date']}, transport {tables[0].transport}"
        written += draw(tables[0].reports, settings.out, footer)
    for item in written:
        _say(f"wrote {os.path.relpath(item)}")


def _tell(segment: Segment) -> None:
    note = f"  void: {', '.join(segment.void)}" if segment.void else ""
    _say(
        f"round {segment.round + 1} {segment.case:24} {segment.tokens_per_s:12,.0f} tokens/s"
        f" {segment.server_us_per_token:9.2f} us/token{note}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times that each case runs (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one segment (%(default)s)")
    parser.add_argument("--sessions", type=int, default=256, help="largest population (%(default)s)")
    names = ", ".join(group.name for group in groups())
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"only groups whose name matches; may be given several times; there are {names}",
    )
    parser.add_argument(
        "--transport",
        choices=("cq", "aio"),
        default="",
        help="all groups on this one (all on cq, the main ones on aio)",
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for bench.json and plots (%(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds that a segment may wait for a free machine, and be measured again if disturbed (%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="1 round of 0.05 s, 16 sessions: does it work, not how fast"
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.seconds, given.sessions = 1, 0.05, MIN_SESSIONS
    if given.rounds < 1 or given.seconds <= 0 or given.sessions < MIN_SESSIONS:
        parser.error(f"at least 1 round, some seconds and {MIN_SESSIONS} sessions are needed")
    settings = Settings(
        Plan(given.rounds, given.seconds, given.patience),
        given.sessions,
        tuple(given.only),
        given.transport,
        given.out,
    )
    if not settings.tables():
        parser.error(f"--only {' '.join(given.only)} matches none of {names}")
    return settings


if __name__ == "__main__":
    sys.exit(main())
