"""`conveyor top`: the command, its keys and its loop."""

import argparse
import contextlib
import itertools
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeAlias

from conveyor.cli.commands import UsageError
from conveyor.cli.top.sample import Reader, Server
from conveyor.cli.top.view import ORDERS, Order, View, view

if TYPE_CHECKING:
    from rich.live import Live

Key: TypeAlias = Literal["quit", "sort", "pause", "faster", "slower"]
_KEYS: dict[bytes, Key] = {b"q": "quit", b"s": "sort", b" ": "pause", b"+": "faster", b"-": "slower"}
_METRICS_PORT = 9464
# The server's own setting, where it is in this environment too.
_PORT_VARIABLE = "CONVEYOR_METRICS_PORT"
_NONE = "none"
_LEAST_S, _MOST_S = 0.2, 60.0


def add_arguments(parser: argparse.ArgumentParser, target: str) -> None:
    """The command's options, beside the common ones; `target` is the default one."""
    parser.add_argument(
        "--target", action="append", metavar="HOST:PORT", help=f"a server; once for each. default: {target}"
    )
    parser.add_argument(
        "--metrics",
        action="append",
        metavar="HOST:PORT",
        help=f"the metrics page of each --target, in their order; more of them are workers' pages. {_NONE}: it has "
        f"none. default: port {_PORT_VARIABLE}, or {_METRICS_PORT}, of the server's host",
    )
    parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="between two looks; default: 2")
    parser.add_argument("--once", action="store_true", help="look twice, an interval apart, print that, and end")
    parser.add_argument("--sort", choices=ORDERS, default="active", help="order of the sessions; default: active")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="sessions shown at most; default: 20")
    parser.set_defaults(timeout_s=2.0, default_target=target)


def top(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: with --once, 1 where a server is away."""
    if not _LEAST_S <= arguments.interval <= _MOST_S:
        raise UsageError(f"--interval is {_LEAST_S:g} to {_MOST_S:g} seconds, not {arguments.interval:g}")
    servers = addresses(arguments.target or [arguments.default_target], arguments.metrics)
    once = arguments.once or arguments.json
    if not arguments.json:
        _check_installed()
    if not once and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("this is no terminal: conveyor top --once prints one view, --json prints it as JSON")
    with Reader(servers, arguments) as reader:
        if once:
            return _print_once(reader, arguments)
        _watch(reader, arguments)
    return 0


def addresses(targets: Sequence[str], metrics: Sequence[str] | None) -> list[Server]:
    """The servers that a command line names.

    Args:
        targets: as --target gives them.
        metrics: as --metrics gives them; None: not at all.

    Raises:
        UsageError: fewer pages than servers.
    """
    if metrics is None:
        return [Server(target, _default_page(target)) for target in targets]
    if len(metrics) < len(targets):
        raise UsageError(
            f"{len(targets)} servers and {len(metrics)} metrics pages: give --metrics for each --target, or "
            f"--metrics {_NONE}"
        )
    pairs = itertools.zip_longest(targets, metrics, fillvalue="")
    return [Server(target, "" if page == _NONE else page) for target, page in pairs]


def _default_page(target: str) -> str:
    host = target.rpartition("/")[2].rpartition(":")[0]
    return f"{host or target}:{os.environ.get(_PORT_VARIABLE) or _METRICS_PORT}"


def _check_installed() -> None:
    try:
        import rich  # noqa: F401 - whether it is there
    except ModuleNotFoundError:
        raise UsageError("conveyor top needs `pip install 'conveyor[top]'`; --json does without") from None


def _print_once(reader: Reader, arguments: argparse.Namespace) -> int:
    before = reader.read()
    time.sleep(arguments.interval)
    shown = view(before, reader.read(), arguments.sort)
    if arguments.json:
        print(json.dumps(_plain(asdict(shown)), indent=2))
    else:
        from conveyor.cli.top.screen import text

        width = max(shutil.get_terminal_size().columns, 160)
        print(text(shown, f"{_title(shown)}  sessions by: {arguments.sort}", rows=arguments.rows, width=width))
    return 0 if shown.answered else 1


def _plain(value: object) -> object:
    """JSON has no infinity, and no numbers as names."""
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _title(shown: View) -> str:
    return f"conveyor top  {datetime.now().astimezone():%H:%M:%S}  over {shown.seconds:.1f} s"


def _watch(reader: Reader, arguments: argparse.Namespace) -> None:
    from rich.live import Live

    order: Order = arguments.sort
    interval_s: float = arguments.interval
    paused = False
    with _keys() as keys, Live(screen=True, auto_refresh=False) as live:
        before = after = reader.read()
        due = time.monotonic() + interval_s
        while True:
            state = f"{'  PAUSED' if paused else ''}  every {interval_s:g} s"
            _show(live, view(before, after, order), f"sessions by: {order}{state}", arguments.rows)
            key = keys.wait(due - time.monotonic())
            if key == "quit":
                return
            if key == "sort":
                order = ORDERS[(ORDERS.index(order) + 1) % len(ORDERS)]
            elif key == "pause":
                paused = not paused
            elif key is not None:
                interval_s = min(_MOST_S, max(_LEAST_S, interval_s / 2 if key == "faster" else interval_s * 2))
            if key is None or key in {"faster", "slower"}:
                if key is None and not paused:
                    before, after = after, reader.read()
                due = time.monotonic() + interval_s


def _show(live: "Live", shown: View, state: str, rows: int) -> None:
    from conveyor.cli.top.screen import draw

    title = f"{_title(shown)}  {state}  [q] quit [s] sort [space] pause [+] [-] interval"
    live.update(draw(shown, title, rows=rows, height=live.console.height), refresh=True)


class _Keys:
    def wait(self, seconds: float) -> Key | None:
        """The next key that means something; None: the time is over."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([sys.stdin], [], [], left)
            if ready:
                given = os.read(sys.stdin.fileno(), 1)
                if not given:
                    return "quit"
                if given in _KEYS:
                    return _KEYS[given]
        return None


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Keys come one by one and are not shown, until the end."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _Keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
