"""A run in words for people, and in JSON for programs.

Invariant: whatever makes the figures worth less is said beside them: a client at its limit, streams that were not
served, steps that were never sent.
"""

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conveyor.bench.histogram import Histogram, Percentiles
from conveyor.bench.result import LoadResult
from conveyor.bench.spec import LoadSpec, Pattern
from conveyor.bench.worker import Snapshot

# Cores of one process from which on the client rather than the server is what was measured.
MAX_CLIENT_CORES = 0.8


def describe(target: str, spec: LoadSpec, processes: int) -> str:
    """The load in one line."""
    pattern = {
        Pattern.CLOSED: "closed loop",
        Pattern.POISSON: f"Poisson arrivals, {spec.rate_per_s:,.0f} steps/s",
        Pattern.BURST: f"bursts, {spec.rate_per_s:,.0f} steps/s in one each {_time(spec.burst_s)}",
    }[spec.pattern]
    parts = [
        f"{_count(spec.sessions, 'session')} on {_count(spec.streams, 'stream')} "
        f"on {_count(spec.connections, 'connection')} of {_count(processes, 'process')}",
        pattern,
        *(["frames"] if spec.frames else []),
        *([f"{spec.time_steps} time steps a step"] if spec.time_steps > 1 else []),
        *([f"{spec.in_flight} steps in flight"] if spec.in_flight > 1 else []),
        *(["steps without room given up"] if spec.shed else []),
        *(["echo"] if spec.echo else []),
    ]
    return f"{spec.model} on {target}: {', '.join(parts)}"


def format_report(spec: LoadSpec, result: LoadResult) -> str:
    """The result as a few aligned lines."""
    lines = [("steps", _steps(spec, result)), ("latency", _percentiles(result.latency))]
    for reason, took in sorted(result.refused.items()):
        lines.append(("refused", f"{took.count:,} {reason}, told within {_percentiles(took)}"))
    if result.unsent:
        waited = _time(result.unsent_oldest_s)
        lines.append(
            (
                "not sent",
                f"{result.unsent:,} steps that fell due: their sessions had none free, the oldest for {waited}",
            )
        )
    if result.shed:
        lines.append(("given up", f"{result.shed:,} steps, as they fell due: their sessions had none free"))
    served = result.served_streams
    lines.append(
        (
            "streams",
            f"{result.active_streams:,} of {served.size:,} served, {served.min():,} to {served.max():,} steps each",
        )
    )
    lines.append(("client", _client(result)))
    return "\n".join([*(f"{name:9} {text}" for name, text in lines), *(f"note: {note}" for note in notes(result))])


def notes(result: LoadResult) -> list[str]:
    """What makes the figures worth less."""
    found = []
    if result.busiest_cores > MAX_CLIENT_CORES:
        found.append(
            f"a process of the client used {result.busiest_cores:.2f} cores, so these may be its limits and not the "
            "server's: use more --processes, or --frames"
        )
    if unserved := result.served_streams.size - result.active_streams:
        found.append(f"{unserved:,} streams had no answer")
    return found


def format_progress(now: Snapshot, before: Snapshot | None) -> str:
    """A run as it stands, in one line."""
    steps, seconds = now.steps, now.elapsed_s
    if before is not None:
        steps, seconds = steps - before.steps, seconds - before.elapsed_s
    found = now.latency.percentiles()
    refused = f", {now.refused:,} refused" if now.refused else ""
    rate = steps / max(seconds, 1e-9)
    latency = f"p50 {_time(found.p50_s)}, p99 {_time(found.p99_s)}"
    return f"{now.elapsed_s:6.1f} s {rate:12,.0f} steps/s, {latency}{refused}"


def to_json(target: str, spec: LoadSpec, processes: int, result: LoadResult) -> dict[str, Any]:
    """All of it. Times in seconds, of histograms in nanoseconds."""
    return {
        "target": target,
        "load": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(spec).items()},
        "processes": processes,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "elapsed_s": result.elapsed_s,
        "steps": result.steps,
        "steps_per_s": result.steps_per_s,
        "time_steps": result.time_steps,
        "requests": result.requests,
        "replies": result.replies,
        "request_bytes": result.request_bytes,
        "reply_bytes": result.reply_bytes,
        "latency": _histogram(result.latency),
        "refused": {reason: _histogram(took) for reason, took in result.refused.items()},
        "unsent": result.unsent,
        "unsent_oldest_s": result.unsent_oldest_s,
        "shed": result.shed,
        "streams": {
            "active": result.active_streams,
            "fewest_steps": int(result.served_streams.min()),
            "most_steps": int(result.served_streams.max()),
        },
        "client_cores": result.client_cpu_s / result.elapsed_s,
        "busiest_client_cores": result.busiest_cores,
        "tick_s": result.tick_s,
        "notes": notes(result),
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"count": histogram.count, **asdict(histogram.percentiles()), "histogram": histogram.to_json()}


def _steps(spec: LoadSpec, result: LoadResult) -> str:
    text = f"{result.steps:,} in {result.elapsed_s:.2f} s, {result.steps_per_s:,.0f}/s"
    if spec.time_steps > 1:
        text += f", {result.steps_per_s * spec.time_steps:,.0f} time steps/s"
    return text


def _client(result: LoadResult) -> str:
    text = f"{result.client_cpu_s / result.elapsed_s:.2f} cores"
    if result.steps:
        text += f", {result.client_cpu_s / result.steps * 1e6:.1f} us a step"
    if result.tick_s:
        text += f"; looks each {_time(result.tick_s)}, which latencies include"
    return text


def _percentiles(histogram: Histogram) -> str:
    found: Percentiles = histogram.percentiles()
    named = {"p50": found.p50_s, "p90": found.p90_s, "p99": found.p99_s, "p99.9": found.p999_s, "max": found.max_s}
    return ", ".join(f"{name} {_time(value_s)}" for name, value_s in named.items())


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
