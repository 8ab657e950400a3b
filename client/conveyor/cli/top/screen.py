"""A view, drawn with rich.

Invariant: what is not known is a dash, never a zero; nothing is told by colour alone.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conveyor.cli.table import duration, size
from conveyor.cli.top.view import ModelView, ServerView, View

_BLOCKS = " ▁▂▃▄▅▆▇█"
_TITLE, _GOOD, _BAD = "bold cyan", "green", "bold red"
# Lines of a table beside its rows: the title and the headings.
_HEAD = 2


def draw(view: View, title: str, *, rows: int, height: int | None = None) -> RenderableType:
    """All tables under a title.

    Args:
        view: what is drawn.
        title: of the whole.
        rows: sessions, at most.
        height: lines there are; None: any number. Sessions make room first.
    """
    parts: list[RenderableType] = [Text(title, style="bold"), _servers(view.servers)]
    lines = 1 + _HEAD + len(view.servers)
    troubles = [trouble for server in view.servers for trouble in server.troubles]
    parts += [Text(trouble, style=_BAD) for trouble in troubles]
    parts.append(_models(view.models))
    failures = [f"{model.name} {model.version}: {model.failure}" for model in view.models if model.failure]
    parts += [Text(failure, style=_BAD) for failure in failures]
    batches = [model for model in view.models if model.batches]
    lines += len(troubles) + len(failures) + _HEAD + len(view.models)
    if batches:
        parts.append(_batches(batches))
        lines += _HEAD + len(batches)
    for text in (_store(view), _counted("errors", view.errors, style=_BAD), _counted("closed", view.closed)):
        if text is not None:
            parts.append(text)
            lines += 1
    parts.append(_idle(view))
    if height is not None:
        for part in parts:
            if isinstance(part, Text):
                # A line each, or what is below would be pushed out.
                part.no_wrap, part.overflow = True, "ellipsis"
    room = rows if height is None else min(rows, height - lines - 1 - _HEAD)
    if room > 0 and view.sessions:
        parts.append(_sessions(view, room))
    return Group(*parts)


def text(view: View, title: str, *, rows: int, width: int) -> str:
    """The same as plain text, `width` characters wide."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(draw(view, title, rows=rows))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=True, header_style="dim")
    return table


def _titled(title: str, table: Table) -> Group:
    return Group(Text(title, style=_TITLE), table)


def _servers(servers: Sequence[ServerView]) -> Group:
    numbers = ("STREAMS", "SESSIONS", "OF", "STEPS/s", "CPU", "MEMORY")
    table = _table("SERVER", "HEALTH", "VERSION", *numbers, "STORE", right=numbers)
    for server in servers:
        good = server.health == "serving"
        table.add_row(
            escape(server.name),
            Text(server.health or "-", style=_GOOD if good else _BAD if server.health else ""),
            server.version or "-",
            *map(_number, (server.streams, server.sessions, server.sessions_limit, server.steps_per_s)),
            _percent(server.cpu),
            "-" if server.resident_bytes is None else size(server.resident_bytes),
            Text(server.store or "-", style=_BAD if server.store == "away" else ""),
        )
    return _titled("servers", table)


def _models(models: Sequence[ModelView]) -> Group:
    latencies = ("QUEUE p50", "p99", "RUN p50", "p99 ", "REPLY p99")
    numbers = ("SESSIONS", "STEPS/s", "TIME STEPS/s", "BATCH", "WAITING", "BUSY")
    table = _table("MODEL", "VERSION", "STATUS", *numbers, *latencies, right=(*numbers, *latencies))
    for model in models:
        table.add_row(
            escape(model.name),
            escape(model.version),
            Text(model.status + (f" {model.device}" if model.device else ""), style=_style(model.status)),
            *map(_number, (model.sessions, model.steps_per_s, model.time_steps_per_s, model.batch, model.ready)),
            _percent(model.busy),
            *map(
                _duration,
                (model.queue_p50_s, model.queue_p99_s, model.run_p50_s, model.run_p99_s, model.reply_p99_s),
            ),
        )
    return _titled("models", table)


def _style(status: str) -> str:
    return {"ready": _GOOD, "failed": _BAD}.get(status, "yellow")


def _batches(models: Sequence[ModelView]) -> Group:
    """Share of the runs by size: only sizes that some model had."""
    bounds = sorted({bound for model in models for bound, share in model.batches.items() if share > 0})
    names = [f"≤{bound:g}" if bound != float("inf") else "more" for bound in bounds]
    table = _table("MODEL", *names, right=names)
    for model in models:
        shares = [model.batches.get(bound, 0.0) for bound in bounds]
        table.add_row(
            f"{escape(model.name)} {escape(model.version)}", *(f"{_block(share)} {share:4.0%}" for share in shares)
        )
    return _titled("batches: share of the runs by how many sessions each took", table)


def _block(share: float) -> str:
    return _BLOCKS[0] if share <= 0 else _BLOCKS[max(1, round(share * (len(_BLOCKS) - 1)))]


def _store(view: View) -> Text | None:
    store = view.store
    if store is None:
        return None
    line = Text().append("store", style=_TITLE)
    line.append(f"  away for {store.away} of {store.of}" if store.away else "  ok", style=_BAD if store.away else _GOOD)
    line.append(
        f"  visit p50 {_duration(store.visit_p50_s)}, p99 {_duration(store.visit_p99_s)}"
        f"  written {_number(store.written_per_s)}/s  failures {_number(store.failures_per_s)}/s"
        f"  not yet written {store.undurable:.0f}, for {duration(store.lag_s)}  asleep {store.asleep:.0f}",
    )
    return line


def _counted(title: str, counts: Mapping[str, tuple[float, float]], *, style: str = "") -> Text | None:
    if not counts:
        return None
    line = Text().append(title, style=_TITLE)
    for name, (rate, total) in counts.items():
        line.append(f"  {name} {_number(rate)}/s of {total:.0f}", style=style if rate else "")
    return line


def _idle(view: View) -> Text:
    seen = f" (of {view.seen} of {view.all_sessions})" if view.seen < view.all_sessions else ""
    line = Text().append(f"idle{seen}", style=_TITLE)
    line.append("  " + "  ".join(f"{name}: {count}" for name, count in view.idle.items()))
    return line


def _sessions(view: View, rows: int) -> Group:
    numbers = ("IDLE", "STEPS", "STEPS/s", "PENDING", "UNSTORED")
    shown = view.sessions[:rows]
    more = f" ({len(shown)} of {view.all_sessions})" if len(shown) < view.all_sessions else ""
    columns = ("SESSION", "MODEL", "VERSION", *numbers, "DURABILITY", "IN", "ATTACHED")
    table = _table(*columns, right=numbers)
    for session in shown:
        table.add_row(
            escape(session.id if len(session.id) <= 40 else session.id[:39] + "…"),
            escape(session.model),
            escape(session.version),
            duration(session.idle_s),
            str(session.steps),
            _number(session.steps_per_s),
            str(session.pending),
            str(session.unstored),
            session.durability,
            session.where,
            "yes" if session.attached else "no",
        )
    return _titled(f"sessions{more}", table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
