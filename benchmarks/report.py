"""From segments to rows and ratios.

Invariant: a ratio is taken within one round and only then the median over the rounds; rounds with a void segment are
left out while others are left, and a number made of void ones says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.cases import Case, Target
from benchmarks.segments import Segment


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the rounds.

    Attributes:
        median: over the rounds that count, or over all where none does.
        low: the smallest of them.
        high: the largest.
        counted: rounds that count; 0: all are void, and the figure is not to be trusted.
    """

    median: float
    low: float
    high: float
    counted: int


@dataclass(frozen=True, slots=True)
class Row:
    """A case's numbers over the rounds.

    Attributes:
        case: what was run.
        tokens_per_s: per second of wall time.
        tokens_per_server_cpu_s: per second of the server's CPU time.
        server_us_per_token: microseconds of the server's CPU time.
        p50_ms, p99_ms: round trip of a message (of a frame; of bare onnxruntime, of a run), milliseconds.
        mean_batch: sessions in one run of the model.
        server_cores, client_cores, foreign_cores: CPU use.
        fewest, most: tokens of the session that got the fewest and the most in any one round that counts.
        request_bytes, reply_bytes: of a message.
        to_bare: tokens per server CPU second against bare onnxruntime's, at the batch of all sessions.
        to_echo: tokens per server CPU second against the echo's.
        speed_to_echo: tokens per second against the echo's.
        to_both: CPU time of one token in the echo and in bare onnxruntime at the same mean batch, together, against
            Conveyor's: 1 means that nothing but wire and model is left.
    """

    case: Case
    tokens_per_s: Spread
    tokens_per_server_cpu_s: Spread
    server_us_per_token: Spread
    p50_ms: Spread
    p99_ms: Spread
    mean_batch: Spread
    server_cores: Spread
    client_cores: Spread
    foreign_cores: Spread
    fewest: int
    most: int
    request_bytes: int
    reply_bytes: int
    to_bare: Spread | None = None
    to_echo: Spread | None = None
    speed_to_echo: Spread | None = None
    to_both: Spread | None = None


# Segments of one round by case name.
Round = Mapping[str, Segment]


def rows_of(cases: Sequence[Case], segments: Iterable[Segment]) -> list[Row]:
    """One row for each case, in that order."""
    rounds: dict[int, dict[str, Segment]] = {}
    for segment in segments:
        rounds.setdefault(segment.round, {})[segment.case] = segment
    return [_row(case, cases, list(rounds.values())) for case in cases]


def _row(case: Case, cases: Sequence[Case], rounds: Sequence[Round]) -> Row:
    def over(read: Callable[[Segment], float]) -> Spread:
        return _spread([case.name], rounds, lambda round_: read(round_[case.name]))

    def ratio(other: str, read: Callable[[Segment], float]) -> Spread | None:
        if not other:
            return None
        return _spread([case.name, other], rounds, lambda round_: read(round_[case.name]) / read(round_[other]))

    counting = _counting([case.name], rounds) or rounds
    last = rounds[-1][case.name].figures
    return Row(
        case=case,
        tokens_per_s=over(lambda segment: segment.tokens_per_s),
        tokens_per_server_cpu_s=over(lambda segment: segment.tokens_per_server_cpu_s),
        server_us_per_token=over(lambda segment: segment.server_us_per_token),
        p50_ms=over(lambda segment: segment.figures.p50_s * 1e3),
        p99_ms=over(lambda segment: segment.figures.p99_s * 1e3),
        mean_batch=over(lambda segment: segment.mean_batch),
        server_cores=over(lambda segment: segment.server_cores),
        client_cores=over(lambda segment: segment.client_cores),
        foreign_cores=over(lambda segment: segment.foreign_cores),
        fewest=min(round_[case.name].figures.fewest for round_ in counting),
        most=max(round_[case.name].figures.most for round_ in counting),
        request_bytes=last.request_bytes,
        reply_bytes=last.reply_bytes,
        to_bare=ratio(case.bare, lambda segment: segment.tokens_per_server_cpu_s),
        to_echo=ratio(case.echo, lambda segment: segment.tokens_per_server_cpu_s),
        speed_to_echo=ratio(case.echo, lambda segment: segment.tokens_per_s),
        to_both=_to_both(case, cases, rounds),
    )


def _to_both(case: Case, cases: Sequence[Case], rounds: Sequence[Round]) -> Spread | None:
    """Row.to_both, with the model's time at the mean batch interpolated between the batches that were run bare."""
    if not case.echo:
        return None
    bare = {item.sessions: item.name for item in cases if item.target is Target.BARE}

    def share(round_: Round) -> float:
        here = round_[case.name]
        model_us = interpolate(
            here.mean_batch, {batch: round_[name].server_us_per_token for batch, name in bare.items()}
        )
        return (round_[case.echo].server_us_per_token + model_us) / here.server_us_per_token

    return _spread([case.name, case.echo, *bare.values()], rounds, share)


def interpolate(batch: float, known: Mapping[int, float]) -> float:
    """Microseconds per token at a batch, linear in the time of a whole run between the batches in `known`."""
    batches = sorted(known)
    batch = min(max(batch, batches[0]), batches[-1])
    for low, high in pairwise(batches):
        if batch <= high:
            low_us, high_us = known[low] * low, known[high] * high
            return (low_us + (high_us - low_us) * (batch - low) / (high - low)) / batch
    return known[batches[-1]]


def _counting(names: Sequence[str], rounds: Sequence[Round]) -> list[Round]:
    return [round_ for round_ in rounds if not any(round_[name].void for name in names)]


def _spread(names: Sequence[str], rounds: Sequence[Round], read: Callable[[Round], float]) -> Spread:
    """A number over the rounds in which none of these cases is void."""
    counting = _counting(names, rounds)
    values = [read(round_) for round_ in counting or rounds]
    return Spread(median(values), min(values), max(values), len(counting))
