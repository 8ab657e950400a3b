"""What is to be reached, and whether it was.

Invariant: a verdict is about the median of the rounds that count; where none counts it is void, and where the client
was the limit of an echo, which makes that echo look dear and a ratio to it look good, it says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.cases import Target
from benchmarks.report import GroupReport, Row, Spread

Read: TypeAlias = Callable[[GroupReport], Spread | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure of one group.

    Attributes:
        group: Group.name.
        title: what the figure is.
        read: finds it; None: the group did not measure it.
        limit: what it is to reach.
        at_least: it is to be at least the limit, else at most.
        digits: after the point, where it is printed.
    """

    group: str
    title: str
    read: Read
    limit: float
    at_least: bool = True
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a goal.

    Attributes:
        label: of the group.
        title: what the figure is.
        limit, at_least, digits: as of the goal.
        value: the figure.
        text: PASS, below, above or void, and `client-bound` where that applies.
    """

    label: str
    title: str
    limit: float
    at_least: bool
    digits: int
    value: Spread
    text: str


# Tokens per second, and microseconds of the server's CPU for each.
_ABSOLUTE = {"streams": (50_000, 25), "connections": (30_000, 40)}


def _full(read: Callable[[Row], Spread]) -> Read:
    def find(report: GroupReport) -> Spread | None:
        row = report.row(Target.FULL)
        return None if row is None else read(row)

    return find


def _goals() -> list[Goal]:
    frames = "tokens per server CPU second, of bare onnxruntime's"
    found = [Goal(name, frames, lambda report: report.ratios.to_bare, 0.85) for name in ("frames-1", "frames-2")]
    found += [
        Goal(name, "tokens per server CPU second", _full(lambda row: row.tokens_per_server_cpu_s), 400_000, digits=0)
        for name in ("gru-frames-1", "gru-frames-2")
    ]
    for name in ("streams-16", "streams", "connections", "stream-1"):
        found.append(Goal(name, "Null, of Echo", lambda report: report.ratios.null_to_echo, 0.90))
        found.append(Goal(name, "Full, of 1/(1/Echo + t(B)/B)", lambda report: report.ratios.to_ceiling, 0.85))
        if name in _ABSOLUTE:
            tokens, micros = _ABSOLUTE[name]
            per_token = _full(lambda row: row.server_us_per_token)
            found.append(Goal(name, "tokens per second", _full(lambda row: row.tokens_per_s), tokens, digits=0))
            found.append(Goal(name, "server CPU us per token", per_token, micros, at_least=False, digits=1))
    title = "median round trip less Echo's and a bare step, us"
    found.append(Goal("stream-1", title, lambda report: report.ratios.overhead_us, 40, at_least=False, digits=0))
    found.append(
        Goal("sdk-session", "pipelined, of ping-pong tokens per second", lambda report: report.ratios.pipelined, 5)
    )
    return found


GOALS = tuple(_goals())


def judge(reports: Sequence[GroupReport], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """The verdicts of all goals whose groups were measured, in the order of the goals."""
    by_name = {report.group.name: report for report in reports}
    found = []
    for goal in goals:
        report = by_name.get(goal.group)
        value = goal.read(report) if report is not None else None
        if report is not None and value is not None:
            text = verdict(value, goal.limit, at_least=goal.at_least)
            found.append(Verdict(report.group.label, goal.title, goal.limit, goal.at_least, goal.digits, value, text))
    return found


def verdict(value: Spread, limit: float, *, at_least: bool) -> str:
    """PASS, below or above, by the median; void where no round counts."""
    if not value.counted:
        return "void"
    reached = value.median >= limit if at_least else value.median <= limit
    text = "PASS" if reached else "below" if at_least else "above"
    return f"{text}, client-bound" if value.client_bound else text
