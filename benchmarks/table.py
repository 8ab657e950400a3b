"""The report as text: for people, on stdout."""

from collections.abc import Sequence

from benchmarks.cases import Target
from benchmarks.report import Row, Spread
from benchmarks.segments import MAX_CLIENT_CORES, MAX_FOREIGN_CORES, Segment

_LABEL = ("", 38)
_COLUMNS = (
    _LABEL,
    ("tokens/s", 9),
    ("/server CPU s", 13),
    ("us/token", 8),
    ("p50 ms", 8),
    ("p99 ms", 8),
    ("batch", 6),
    ("server", 7),
    ("client", 7),
    ("others", 7),
    ("per session", 13),
    ("rounds", 6),
)
_RATIO_COLUMNS = (
    _LABEL,
    ("to onnxruntime", 22),
    ("to echo", 22),
    ("to both together", 22),
    ("speed to echo", 22),
)
_TITLES = {
    Target.BARE: "onnxruntime bare, one thread",
    Target.CONVEYOR: "Conveyor",
    Target.ECHO: "bare grpc.aio echo, no model",
}
_MOST_VOID = 12


def format_rows(rows: Sequence[Row], rounds: int) -> str:
    """Each case's numbers: medians over the rounds that count."""
    lines = [_line([title for title, _ in _COLUMNS], _COLUMNS)]
    for target, title in _TITLES.items():
        lines.append(title)
        lines += [_line(_cells(row, rounds), _COLUMNS) for row in rows if row.case.target is target]
    return "\n".join(lines)


def format_ratios(rows: Sequence[Row], rounds: int) -> str:
    """Conveyor's ratios: the median of the rounds' ratios, lowest to highest, and the rounds if not all count."""
    lines = [_line([title for title, _ in _RATIO_COLUMNS], _RATIO_COLUMNS)]
    for row in rows:
        if row.case.target is Target.CONVEYOR:
            ratios = (row.to_bare, row.to_echo, row.to_both, row.speed_to_echo)
            lines.append(_line([f"  {row.case.label}", *(_ratio(ratio, rounds) for ratio in ratios)], _RATIO_COLUMNS))
    return "\n".join(lines)


def format_void(segments: Sequence[Segment]) -> str:
    """How many segments do not count, and why; the first few by name."""
    void = [segment for segment in segments if segment.void]
    lines = [
        f"{len(void)} of {len(segments)} segments are void: others used over {MAX_FOREIGN_CORES:g} cores, or a session "
        "was not served. Where 0 rounds count, a figure is made of void ones and proves nothing."
    ]
    lines += [
        f"  round {segment.round + 1}, {segment.case}: {', '.join(segment.void)}" for segment in void[:_MOST_VOID]
    ]
    if len(void) > _MOST_VOID:
        lines.append(f"  and {len(void) - _MOST_VOID} more, in bench.json")
    return "\n".join(lines)


def format_client_bound(rows: Sequence[Row]) -> str:
    """Which rows tell of the load client rather than of the server."""
    names = [row.case.name for row in rows if row.client_cores.median > MAX_CLIENT_CORES]
    if not names:
        return f"The load client used at most {MAX_CLIENT_CORES:g} cores everywhere."
    return (
        f"The load client used over {MAX_CLIENT_CORES:g} cores in {', '.join(names)}: their tokens per second are its "
        "limit, not the server's; the server's CPU per token stands."
    )


def _cells(row: Row, rounds: int) -> list[str]:
    batch = row.mean_batch.median
    return [
        f"  {row.case.label}",
        f"{row.tokens_per_s.median:,.0f}",
        f"{row.tokens_per_server_cpu_s.median:,.0f}",
        f"{row.server_us_per_token.median:.2f}",
        f"{row.p50_ms.median:.3f}",
        f"{row.p99_ms.median:.3f}",
        f"{batch:.1f}" if batch else "-",
        f"{row.server_cores.median:.2f}",
        "-" if row.case.target is Target.BARE else f"{row.client_cores.median:.2f}",
        f"{row.foreign_cores.median:.2f}",
        f"{row.fewest}-{row.most}",
        f"{row.tokens_per_s.counted}/{rounds}",
    ]


def _ratio(ratio: Spread | None, rounds: int) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
    return text if ratio.counted == rounds else f"{text} {ratio.counted}/{rounds}"


def _line(cells: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    first, *others = (cell.rjust(width) for cell, (_, width) in zip(cells, columns, strict=True))
    return " ".join([cells[0].ljust(len(first)), *others])
