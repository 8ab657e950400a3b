"""`make bench`: Conveyor beside bare onnxruntime and a bare gRPC echo, in one run on one machine.

Server, echo, load client and the bare loop are processes of their own; only one of the three answers at a time.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import echo
from benchmarks.accounting import processor_name
from benchmarks.bare import BareDriver
from benchmarks.cases import MIN_SESSIONS, MODEL, Case, Target, cases
from benchmarks.load import LoadDriver
from benchmarks.plot import draw
from benchmarks.report import Row, rows_of
from benchmarks.segments import Plan, Rig, Segment, measure, measure_rounds
from benchmarks.service import Service
from benchmarks.table import format_client_bound, format_ratios, format_rows, format_void
from benchmarks.worker import Child, Worker

_OUT = Path(__file__).parent / "out"
_WARM_UP_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    Attributes:
        plan: how much is measured.
        sessions: the largest population.
        out: folder of bench.json and the plots.
    """

    plan: Plan
    sessions: int
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; returns the exit status."""
    settings = _parse(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ended from outside, the bench still ends its processes in order.
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    chosen = cases(settings.sessions)
    with _rig(chosen) as rig:
        for case in chosen:
            measure(rig, case, -1, min(_WARM_UP_S, settings.plan.seconds))
        segments = measure_rounds(rig, chosen, settings.plan, _tell)
    rows = rows_of(chosen, segments)
    machine = describe_machine()
    _print(rows, segments, settings, machine)
    _write(rows, segments, settings, machine)
    return 0


@contextlib.contextmanager
def _rig(chosen: Sequence[Case]) -> Iterator[Rig]:
    """Starts all processes and opens all cases; ends them all."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conveyor-bench-")))
        _say("exporting the model")
        export = [sys.executable, "-m", "benchmarks.model", str(folder / "models")]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        _say("starting server, echo, client and bare loop")
        service = Service(folder / "models", folder)
        stack.callback(service.stop)
        echo_server = Child(echo.main)
        stack.callback(echo_server.stop)
        addresses = {Target.CONVEYOR: service.address, Target.ECHO: f"127.0.0.1:{echo_server.receive()}"}
        client = Worker(LoadDriver, addresses)
        stack.callback(client.close)
        bare = Worker(BareDriver, folder / "models" / MODEL / "1" / "model.onnx")
        stack.callback(bare.close)
        rig = Rig(
            servers={Target.BARE: bare.pid, Target.CONVEYOR: service.pid, Target.ECHO: echo_server.pid},
            workers={Target.BARE: bare, Target.CONVEYOR: client, Target.ECHO: client},
            batches=service.batches,
        )
        for case in chosen:
            rig.workers[case.target].open(case)
        yield rig


def describe_machine() -> dict[str, Any]:
    """What the figures depend on. No host or user names."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("conveyor", "onnxruntime", "grpcio", "protobuf", "numpy")},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def _print(rows: Sequence[Row], segments: Sequence[Segment], settings: Settings, machine: dict[str, Any]) -> None:
    print(f"{machine['processor']}, {machine['cores']} cores; ", end="")
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name not in {"processor", "cores"}))
    rounds = settings.plan.rounds
    print(f"{rounds} rounds of {settings.plan.seconds:g} s, medians; server, client, others: cores in use\n")
    print(format_rows(rows, rounds))
    print("\nConveyor's tokens per server CPU second against the others' (speed: per second), median (lowest-highest)")
    print(format_ratios(rows, rounds))
    print(f"\n{format_client_bound(rows)}\n{format_void(segments)}")


def _write(rows: Sequence[Row], segments: Sequence[Segment], settings: Settings, machine: dict[str, Any]) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "settings": {**dataclasses.asdict(settings.plan), "sessions": settings.sessions},
        "rows": [dataclasses.asdict(row) for row in rows],
        "segments": [dataclasses.asdict(segment) for segment in segments],
    }
    path = settings.out / "bench.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    footer = f"{machine['processor']}, {machine['cores']} cores, {machine['date']}: LSTM 64-256-64, float32, one thread"
    for written in (path, *draw(rows, settings.out, footer)):
        _say(f"wrote {os.path.relpath(written)}")


def _tell(segment: Segment) -> None:
    note = f"  void: {', '.join(segment.void)}" if segment.void else ""
    _say(f"round {segment.round + 1} {segment.case:20} {segment.tokens_per_s:12,.0f} tokens/s{note}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times that each case runs (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one segment (%(default)s)")
    parser.add_argument("--sessions", type=int, default=256, help="largest population (%(default)s)")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for bench.json and plots (%(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds that a segment may wait for a free machine, and be measured again if disturbed (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.3 s: does it work, not how fast is it")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds <= 0 or given.sessions < MIN_SESSIONS:
        parser.error(f"at least 1 round, some seconds and {MIN_SESSIONS} sessions are needed")
    if given.quick:
        given.rounds, given.seconds = 2, 0.3
    return Settings(Plan(given.rounds, given.seconds, given.patience), given.sessions, given.out)


if __name__ == "__main__":
    sys.exit(main())
