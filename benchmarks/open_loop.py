"""`make bench-open`: latency of an open loop at shares of the closed loop's rate, and what becomes of the excess.

The closed loop of 256 sessions gives the peak; then steps fall due at random (Poisson) at 55, 80 and 120 % of it,
whatever the server does, and a latency counts from when its step fell due. Two forms: a gateway, whose steps of a
moment travel in a frame for each of a few streams, and a session for each stream, one message a step.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from conveyor.bench import Load, LoadResult, LoadSpec, Pattern
from conveyor.bench.histogram import Histogram

from benchmarks.accounting import Meter
from benchmarks.program import Findings, Goal, figures_of, run
from benchmarks.service import Service
from benchmarks.stage import MODEL, say, stage

SHARES = (0.55, 0.80, 1.20)
# Of the two shares below 1; and above it, what is answered keeps to the second.
P99_S = {0.55: 0.003, 0.80: 0.015}
REFUSAL_S = 0.05
THROUGHPUT = 0.90
# What a refused step may be told: RESOURCE_EXHAUSTED, and of those behind it, that they wait for it.
REFUSALS = ("OVERLOADED", "CREDIT_EXCEEDED", "STEP_ABORTED")
# Steps of one session on their way at most; what falls due beyond them waits in the client, and is told.
IN_FLIGHT = 16
# Beyond the peak an app gives up what its session's credit has no room for. The credit is the server's word: one more
# step would be refused (RESOURCE_EXHAUSTED, CREDIT_EXCEEDED); but a message that is refused costs the server nearly
# what an answered one costs, so whoever sends them all the same takes from those who are served.
CREDIT = 3
_WARM_UP_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How steps travel.

    Attributes:
        name: in the report.
        label: in words.
        spec: the load, closed, one step of a session at a time.
    """

    name: str
    label: str
    spec: LoadSpec


def forms(sessions: int) -> list[Form]:
    """Both of them, for so many sessions."""
    base = LoadSpec(model=MODEL, sessions=sessions)
    streams, connections = sessions, min(8, sessions)
    return [
        Form(
            "gateway",
            f"{sessions} sessions in frames on 1 stream",
            dataclasses.replace(base, frames=True),
        ),
        Form(
            "streams",
            f"{sessions} streams on {connections} connections",
            dataclasses.replace(base, streams=streams, connections=connections),
        ),
    ]


def refusals(result: LoadResult) -> Histogram:
    """How long it took to say no, whatever the reason."""
    together = Histogram()
    for took in result.refused.values():
        together.add(took)
    return together


def judge(form: Form, peak: float, results: dict[float, LoadResult]) -> list[Goal]:
    """The goals of one form."""
    goals = []
    for share, limit_s in P99_S.items():
        p99_s = results[share].latency.percentiles().p99_s
        goals.append(
            Goal(
                f"{form.label} at {share:.0%}: p99 {p99_s * 1e3:.2f} ms, to be under {limit_s * 1e3:g} ms",
                p99_s < limit_s and not results[share].refused,
            )
        )
    over = results[SHARES[-1]]
    ratio = over.steps_per_s / peak
    goals.append(
        Goal(
            f"{form.label} at {SHARES[-1]:.0%}: {ratio:.0%} of the peak answered, {THROUGHPUT:.0%} wanted",
            ratio >= THROUGHPUT,
        )
    )
    p99_s, limit_s = over.latency.percentiles().p99_s, P99_S[0.80]
    goals.append(
        Goal(
            f"{form.label} at {SHARES[-1]:.0%}: p99 of what is answered {p99_s * 1e3:.2f} ms, to be under "
            f"{limit_s * 1e3:g} ms",
            p99_s < limit_s,
        )
    )
    return [*goals, judge_refusals(form, over)]


def judge_refusals(form: Form, over: LoadResult) -> Goal:
    """Whatever is not answered is known not to be within 50 ms: by the session's credit at once, or from the server."""
    told = refusals(over)
    took = told.percentiles()
    others = sorted(set(over.refused) - set(REFUSALS))
    text = (
        f"{form.label} at {SHARES[-1]:.0%}: of the excess, {over.shed:,} steps turned away by their session's credit, "
        f"at once, and {told.count:,} by the server, within p99 {took.p99_s * 1e3:.1f}, max {took.max_s * 1e3:.1f} ms; "
        f"{REFUSAL_S * 1e3:g} ms wanted"
    )
    text += f"; for other reasons: {', '.join(others)}" if others else ""
    return Goal(text, not over.unsent and not others and took.max_s <= REFUSAL_S)


def describe(share: float, result: LoadResult, usage: Any) -> str:
    """A line of the report."""
    took = result.latency.percentiles()
    refused = ", ".join(f"{count.count:,} {reason}" for reason, count in sorted(result.refused.items()))
    return (
        f"  {share:4.0%}  {result.steps_per_s:9,.0f}/s answered; p50 {took.p50_s * 1e3:.2f}, "
        f"p99 {took.p99_s * 1e3:.2f}, p99.9 {took.p999_s * 1e3:.2f}, max {took.max_s * 1e3:.2f} ms; "
        f"refused: {refused or 'none'}; given up: {result.shed:,}, never sent: {result.unsent:,}; "
        f"cores: server {usage.server_s / usage.elapsed_s:.2f}, "
        f"client {usage.client_s / usage.elapsed_s:.2f}, others {usage.foreign_s / usage.elapsed_s:.2f}"
    )


def _load(service: Service, spec: LoadSpec, seconds: float, rounds: int) -> tuple[list[LoadResult], Any]:
    """Runs after a warm-up; the CPU is that of the last run."""
    load = Load(service.address, spec)
    try:
        load.open()
        gc.collect()
        gc.freeze()
        load.run(min(_WARM_UP_S, seconds))
        results = []
        for _ in range(rounds):
            # The client is this process: what it uses is not foreign, and told by the load itself.
            meter = Meter(service.pid, [])
            results.append(load.run(seconds))
            usage = meter.stop()
        usage = dataclasses.replace(usage, client_s=results[-1].client_cpu_s)
        return results, usage
    finally:
        load.close()
        gc.unfreeze()


def _measure_form(service: Service, form: Form, settings: argparse.Namespace) -> tuple[dict[str, Any], list[Goal]]:
    say(f"{form.label}: the peak")
    closed, _ = _load(service, form.spec, settings.seconds / 2, settings.rounds)
    peak = statistics.median(result.steps_per_s for result in closed)
    print(f"{form.label}: the closed loop answers {peak:,.0f} steps/s")
    results, cpu = {}, {}
    for share in SHARES:
        spec = dataclasses.replace(
            form.spec,
            pattern=Pattern.POISSON,
            rate_per_s=share * peak,
            in_flight=settings.in_flight if share < 1 else settings.credit,
            shed=share > 1,
        )
        (results[share],), cpu[share] = _load(service, spec, settings.seconds, 1)
        print(describe(share, results[share], cpu[share]), flush=True)
    figures = {
        "peak_per_s": peak,
        "shares": {
            f"{share:.2f}": {**figures_of(result), "cpu": dataclasses.asdict(cpu[share])}
            for share, result in results.items()
        },
    }
    return figures, judge(form, peak, results)


def measure(settings: argparse.Namespace) -> Findings:
    """Both forms against one server."""
    if settings.quick:
        settings.seconds, settings.rounds = 0.2, 1
    figures: dict[str, Any] = {"in_flight": settings.in_flight, "credit": settings.credit, "flags": settings.server}
    goals: list[Goal] = []
    with stage() as on:
        service = on.serve(*settings.server)
        for form in forms(settings.sessions):
            figures[form.name], found = _measure_form(service, form, settings)
            goals += found
    return Findings(figures, goals)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=256, help="how many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each open loop (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the closed loop, whose median counts (%(default)s)")
    parser.add_argument(
        "--in-flight", type=int, default=IN_FLIGHT, help="unanswered steps of a session at most (%(default)s)"
    )
    parser.add_argument("--credit", type=int, default=CREDIT, help="the same beyond the peak (%(default)s)")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="further flags of the server, last")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("open_loop", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
