"""From segments to rows and ratios.

Invariant: a ratio is taken within one round and only then the median over the rounds; rounds with a void segment are
left out while others are left, and a number made of void ones says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.cases import ECHOES, Case, Client, Group, Target
from benchmarks.segments import Segment


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the rounds.

    Attributes:
        median: over the rounds that count, or over all where none does.
        low: the smallest of them.
        high: the largest.
        counted: rounds that count; 0: all are void, and the figure is not to be trusted.
        client_bound: rounds among them in which the client was the limit of an echo that the number is made of.
    """

    median: float
    low: float
    high: float
    counted: int
    client_bound: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A case's numbers over the rounds.

    Attributes:
        case: what was run.
        tokens_per_s: per second of wall time.
        tokens_per_server_cpu_s: per second of the server's CPU time.
        server_us_per_token, server_us_per_message: microseconds of the server's CPU time; a frame is one message.
        p50_ms, p99_ms: round trip of a message (of a frame; of bare onnxruntime, of a run), milliseconds.
        mean_batch: sessions in one run of the model.
        server_cores, client_cores, foreign_cores: CPU use.
        streams: that were served in the round that served the fewest.
        fewest_messages, most_messages: of a stream in any one round that counts.
        fewest, most: tokens of a session in any one round that counts.
        request_bytes, reply_bytes: of a message.
    """

    case: Case
    tokens_per_s: Spread
    tokens_per_server_cpu_s: Spread
    server_us_per_token: Spread
    server_us_per_message: Spread
    p50_ms: Spread
    p99_ms: Spread
    mean_batch: Spread
    server_cores: Spread
    client_cores: Spread
    foreign_cores: Spread
    streams: int
    fewest_messages: int
    most_messages: int
    fewest: int
    most: int
    request_bytes: float
    reply_bytes: float


@dataclass(frozen=True, slots=True)
class Ratios:
    """What a group is measured for; None where it has not the cases. Rates are tokens per server CPU second.

    Attributes:
        to_bare: Full against bare onnxruntime at the batch of all sessions.
        null_to_echo: Null against Echo.
        to_ceiling: Full against 1 / (1/Echo + t(B)/B): what is left when only the wire and the model at the mean batch
            B are paid for. 1: nothing else is.
        to_bare_ceiling: as to_ceiling, with the bare echo of the same kind in Echo's place.
        echo_to_bare_echo: Echo against the bare echo of the same kind.
        overhead_us: Full's median round trip less Echo's and less bare onnxruntime's step, microseconds.
        pipelined: tokens per second of wall time pipelined against ping-pong.
    """

    to_bare: Spread | None = None
    null_to_echo: Spread | None = None
    to_ceiling: Spread | None = None
    to_bare_ceiling: Spread | None = None
    echo_to_bare_echo: Spread | None = None
    overhead_us: Spread | None = None
    pipelined: Spread | None = None


@dataclass(frozen=True, slots=True)
class GroupReport:
    """A group's rows, in the order of its cases, and ratios."""

    group: Group
    rows: tuple[Row, ...]
    ratios: Ratios

    def row(self, target: Target) -> Row | None:
        """The first row of a target."""
        return next((row for row in self.rows if row.case.target is target), None)


# Segments of one round by case name.
Round = Mapping[str, Segment]
_Read = Callable[[Segment], float]


def report_of(group: Group, segments: Iterable[Segment]) -> GroupReport:
    """Rows and ratios of a group's segments; of two of the same case and round, the later counts."""
    by_round: dict[int, dict[str, Segment]] = {}
    for segment in segments:
        by_round.setdefault(segment.round, {})[segment.case] = segment
    rounds = list(by_round.values())
    return GroupReport(group, tuple(_row(case, rounds) for case in group.cases), ratios_of(group, rounds))


def ratios_of(group: Group, rounds: Sequence[Round]) -> Ratios:
    """All ratios that the group has the cases for."""
    names = {case.target: case.name for case in reversed(group.cases)}
    bare = {case.sessions: case.name for case in group.cases if case.target is Target.BARE}
    bare_echo = names.get(Target.CQ_ECHO, names.get(Target.AIO_ECHO))
    full, null, echo = (names.get(target) for target in (Target.FULL, Target.NULL, Target.ECHO))
    over = _Over(group, rounds)
    clients = {case.client: case.name for case in group.cases}
    return Ratios(
        to_bare=over.ratio(full, bare[max(bare)] if bare else None),
        null_to_echo=over.ratio(null, echo),
        to_ceiling=over.to_ceiling(full, echo, bare),
        to_bare_ceiling=over.to_ceiling(full, bare_echo, bare),
        echo_to_bare_echo=over.ratio(echo, bare_echo),
        overhead_us=over.overhead_us(full, echo, bare.get(1)) if set(bare) == {1} else None,
        pipelined=over.ratio(
            clients.get(Client.PIPELINE), clients.get(Client.STEPS), lambda segment: segment.tokens_per_s
        ),
    )


class _Over:
    """Numbers over the rounds of a group; None where a case that one is made of is missing."""

    def __init__(self, group: Group, rounds: Sequence[Round]) -> None:
        self._rounds = rounds
        self._echoes = {case.name for case in group.cases if case.target in ECHOES}

    def ratio(
        self, one: str | None, other: str | None, read: _Read = lambda segment: segment.tokens_per_server_cpu_s
    ) -> Spread | None:
        if one is None or other is None:
            return None
        return self.spread([one, other], lambda round_: read(round_[one]) / read(round_[other]))

    def to_ceiling(self, full: str | None, echo: str | None, bare: Mapping[int, str]) -> Spread | None:
        if full is None or echo is None or not bare:
            return None

        def share(round_: Round) -> float:
            here = round_[full]
            known = {batch: round_[name].server_us_per_token for batch, name in bare.items()}
            least_us = round_[echo].server_us_per_token + interpolate(here.mean_batch, known)
            return least_us / here.server_us_per_token

        return self.spread([full, echo, *bare.values()], share)

    def overhead_us(self, full: str | None, echo: str | None, bare: str | None) -> Spread | None:
        if full is None or echo is None or bare is None:
            return None

        def more(round_: Round) -> float:
            return 1e6 * (round_[full].figures.p50_s - round_[echo].figures.p50_s - round_[bare].figures.p50_s)

        return self.spread([full, echo, bare], more)

    def spread(self, names: Sequence[str], read: Callable[[Round], float]) -> Spread:
        """A number over the rounds in which none of these cases is void."""
        rounds = counting(names, self._rounds)
        values = [read(round_) for round_ in rounds or self._rounds]
        echoes = self._echoes.intersection(names)
        bound = sum(any(round_[name].client_bound for name in echoes) for round_ in rounds)
        return Spread(median(values), min(values), max(values), len(rounds), bound)


def interpolate(batch: float, known: Mapping[int, float]) -> float:
    """Microseconds per token at a batch, linear in the time of a whole run between the batches in `known`."""
    batches = sorted(known)
    batch = min(max(batch, batches[0]), batches[-1])
    for low, high in pairwise(batches):
        if batch <= high:
            low_us, high_us = known[low] * low, known[high] * high
            return (low_us + (high_us - low_us) * (batch - low) / (high - low)) / batch
    return known[batches[-1]]


def counting(names: Sequence[str], rounds: Sequence[Round]) -> list[Round]:
    """The rounds in which none of these cases is void."""
    return [round_ for round_ in rounds if not any(round_[name].void for name in names)]


def _row(case: Case, rounds: Sequence[Round]) -> Row:
    def over(read: _Read) -> Spread:
        values = [read(round_[case.name]) for round_ in chosen]
        return Spread(median(values), min(values), max(values), len(counted), bound)

    counted = counting([case.name], rounds)
    bound = sum(round_[case.name].client_bound for round_ in counted)
    chosen = counted or rounds
    seen = [round_[case.name].figures for round_ in chosen]
    return Row(
        case=case,
        tokens_per_s=over(lambda segment: segment.tokens_per_s),
        tokens_per_server_cpu_s=over(lambda segment: segment.tokens_per_server_cpu_s),
        server_us_per_token=over(lambda segment: segment.server_us_per_token),
        server_us_per_message=over(lambda segment: segment.server_us_per_message),
        p50_ms=over(lambda segment: segment.figures.p50_s * 1e3),
        p99_ms=over(lambda segment: segment.figures.p99_s * 1e3),
        mean_batch=over(lambda segment: segment.mean_batch),
        server_cores=over(lambda segment: segment.server_cores),
        client_cores=over(lambda segment: segment.client_cores),
        foreign_cores=over(lambda segment: segment.foreign_cores),
        streams=min(figures.streams for figures in seen),
        fewest_messages=min(figures.fewest_messages for figures in seen),
        most_messages=max(figures.most_messages for figures in seen),
        fewest=min(figures.fewest for figures in seen),
        most=max(figures.most for figures in seen),
        request_bytes=seen[-1].request_bytes,
        reply_bytes=seen[-1].reply_bytes,
    )
