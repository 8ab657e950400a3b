"""The report as text: for people, on stdout."""

from collections.abc import Sequence

from benchmarks.cases import Target
from benchmarks.goals import Verdict
from benchmarks.report import GroupReport, Row, Spread
from benchmarks.segments import MAX_CLIENT_CORES, MAX_FOREIGN_CORES, Segment

_LABEL = ("", 40)
_COLUMNS = (
    _LABEL,
    ("tokens/s", 9),
    ("/server CPU s", 13),
    ("us/token", 8),
    ("us/message", 10),
    ("p50 ms", 8),
    ("p99 ms", 8),
    ("batch", 6),
    ("server", 6),
    ("client", 6),
    ("others", 6),
    ("streams", 7),
    ("per stream", 13),
    ("rounds", 6),
    ("", 12),
)
_RATIO_COLUMNS = (
    ("", 46),
    ("Full/onnxruntime", 21),
    ("Null/Echo", 21),
    ("Full/ceiling", 21),
    ("Full/bare ceiling", 21),
    ("Echo/bare echo", 21),
)
_GOAL_COLUMNS = (("", 46), ("", 52), ("goal", 10), ("median (lowest-highest)", 30), ("rounds", 6), ("", 19))
_MOST_VOID = 12


def format_rows(reports: Sequence[GroupReport], rounds: int) -> str:
    """Each case's numbers, group by group: medians over the rounds that count."""
    lines = [_line([title for title, _ in _COLUMNS], _COLUMNS)]
    for report in reports:
        lines.append(report.group.label)
        lines += [_line(_cells(row, rounds), _COLUMNS) for row in report.rows]
    return "\n".join(lines)


def format_ratios(reports: Sequence[GroupReport], rounds: int) -> str:
    """The ratios: the median of the rounds' ratios, lowest to highest, and the rounds if not all count."""
    lines = [_line([title for title, _ in _RATIO_COLUMNS], _RATIO_COLUMNS)]
    for report in reports:
        ratios = report.ratios
        found = (
            ratios.to_bare,
            ratios.null_to_echo,
            ratios.to_ceiling,
            ratios.to_bare_ceiling,
            ratios.echo_to_bare_echo,
        )
        if any(found):
            lines.append(_line([report.group.label, *(_ratio(ratio, rounds) for ratio in found)], _RATIO_COLUMNS))
    return "\n".join(lines)


def format_goals(verdicts: Sequence[Verdict], rounds: int) -> str:
    """What was to be reached, and whether it was."""
    lines = [_line([title for title, _ in _GOAL_COLUMNS], _GOAL_COLUMNS)]
    label = ""
    for item in verdicts:
        value, digits = item.value, item.digits
        cells = [
            item.label if item.label != label else "",
            item.title,
            f"{'>=' if item.at_least else '<='} {item.limit:,.{digits}f}",
            f"{value.median:,.{digits}f} ({value.low:,.{digits}f}-{value.high:,.{digits}f})",
            f"{value.counted}/{rounds}",
            item.text,
        ]
        label = item.label
        lines.append(_line(cells, _GOAL_COLUMNS, left=(0, 1, 5)))
    return "\n".join(lines)


def format_void(segments: Sequence[Segment]) -> str:
    """How many segments do not count, and why; the first few by name."""
    void = [segment for segment in segments if segment.void]
    lines = [
        f"{len(void)} of {len(segments)} segments are void: others used over {MAX_FOREIGN_CORES:g} cores, the client "
        f"over {MAX_CLIENT_CORES:g}, or a stream or session was not served. Where 0 rounds count, a figure is made of "
        "void ones and proves nothing."
    ]
    lines += [
        f"  round {segment.round + 1}, {segment.case}: {', '.join(segment.void)}" for segment in void[:_MOST_VOID]
    ]
    if len(void) > _MOST_VOID:
        lines.append(f"  and {len(void) - _MOST_VOID} more, in bench.json")
    return "\n".join(lines)


def _cells(row: Row, rounds: int) -> list[str]:
    batch, bare = row.mean_batch.median, row.case.target is Target.BARE
    return [
        f"  {row.case.label}",
        f"{row.tokens_per_s.median:,.0f}",
        f"{row.tokens_per_server_cpu_s.median:,.0f}",
        f"{row.server_us_per_token.median:.2f}",
        f"{row.server_us_per_message.median:,.1f}",
        f"{row.p50_ms.median:.3f}",
        f"{row.p99_ms.median:.3f}",
        f"{batch:.1f}" if batch else "-",
        f"{row.server_cores.median:.2f}",
        "-" if bare else f"{row.client_cores.median:.2f}",
        f"{row.foreign_cores.median:.2f}",
        "-" if bare else f"{row.streams}",
        f"{row.fewest_messages}-{row.most_messages}",
        f"{row.tokens_per_s.counted}/{rounds}",
        "client-bound" if row.tokens_per_s.client_bound else "",
    ]


def _ratio(ratio: Spread | None, rounds: int) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}){'*' if ratio.client_bound else ''}"
    return text if ratio.counted == rounds else f"{text} {ratio.counted}/{rounds}"


def _line(cells: Sequence[str], columns: Sequence[tuple[str, int]], left: Sequence[int] = (0,)) -> str:
    """Cells side by side; those in `left` begin where their column does."""
    padded = [
        cell.ljust(width) if place in left else cell.rjust(width)
        for place, (cell, (_, width)) in enumerate(zip(cells, columns, strict=True))
    ]
    return " ".join(padded).rstrip()
