"""`conveyor bench`: puts load on a server and says how fast it answers."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conveyor.cli.commands import UsageError

if TYPE_CHECKING:
    from conveyor.bench.worker import Snapshot

_PLOTS = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser, target: str) -> None:
    """The command's options; `target` is the default one."""
    parser.add_argument("--target", default=target, metavar="HOST:PORT", help="the server; default: %(default)s")
    parser.add_argument("--ca", "--tls-ca", type=Path, metavar="PEM", help="encrypt, and trust these root certificates")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        default=os.environ.get("CONVEYOR_TOKEN_FILE"),
        help="file of the bearer token to show; default: CONVEYOR_TOKEN_FILE",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="the model to step")
    parser.add_argument("--version", default="", metavar="V", help="the model's version; default: the latest")
    load = parser.add_argument_group("load")
    load.add_argument("--sessions", type=int, default=64, metavar="N", help="default: %(default)s")
    load.add_argument("--streams", type=int, metavar="N", help="default: one a session; with --frames one a connection")
    load.add_argument("--connections", type=int, metavar="N", help="default: 8, or fewer where there are fewer streams")
    load.add_argument("--processes", type=int, default=1, metavar="N", help="of the client; default: %(default)s")
    load.add_argument(
        "--pattern",
        choices=("closed", "poisson", "burst"),
        default="closed",
        help="closed: a session steps as soon as it has its answer. poisson, burst: steps fall due at --rate, at "
        "random or many at once, whatever the server does, and latency counts from then. default: %(default)s",
    )
    load.add_argument("--rate", type=float, default=0.0, metavar="R", help="steps per second of poisson and burst")
    load.add_argument("--burst-s", type=float, default=0.1, metavar="S", help="between bursts; default: %(default)s")
    load.add_argument("--frames", action="store_true", help="send the steps of a stream's sessions in one message")
    load.add_argument("--in-flight", type=int, default=1, metavar="K", help="unanswered steps of a session; default: 1")
    load.add_argument(
        "--shed",
        action="store_true",
        help="poisson and burst: give a step up that falls due while its session has K unanswered; default: it waits",
    )
    load.add_argument("--chunk", type=int, default=1, metavar="T", help="time steps of a step; default: %(default)s")
    load.add_argument(
        "--integers-below", type=int, default=2, metavar="N", help="token ids are drawn below; default: 2"
    )
    load.add_argument("--seconds", type=float, default=10.0, metavar="S", help="default: %(default)s")
    load.add_argument("--warm-up", type=float, default=1.0, metavar="S", help="load before that; default: %(default)s")
    load.add_argument("--echo", action="store_true", help="ask the transport alone; the server needs --diagnostics")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; -: to standard output")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies, .png or .svg")


def bench(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    # Here, as hpack and matplotlib come with an extra that the other commands do without.
    from conveyor.bench.fleet import Fleet, shares
    from conveyor.bench.plot import draw
    from conveyor.bench.report import describe, format_report, to_json

    _check(arguments)
    processes = arguments.processes
    try:
        spec = _spec(arguments)
        shares(spec, processes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    title = describe(arguments.target, spec, processes)
    print(title, file=sys.stderr)
    progress = _Progress() if sys.stderr.isatty() else None
    with Fleet(arguments.target, spec, processes) as fleet:
        if arguments.warm_up:
            fleet.run(arguments.warm_up)
        result = fleet.run(arguments.seconds, progress)
    if progress:
        progress.wipe()
    text = json.dumps(to_json(arguments.target, spec, processes, result), indent=1)
    if arguments.json == Path("-"):
        print(text)
    else:
        print(format_report(spec, result))
    try:
        if arguments.json and arguments.json != Path("-"):
            arguments.json.write_text(text + "\n", encoding="utf-8")
        if arguments.plot:
            draw(result, title, arguments.plot)
    except OSError as error:
        raise UsageError(str(error)) from None
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Before any load is put on: what would only fail behind it."""
    if arguments.seconds <= 0 or arguments.warm_up < 0:
        raise UsageError("--seconds is above 0, and --warm-up not below")
    for path in (arguments.json, arguments.plot):
        if path and not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent} is no folder")
    if arguments.plot:
        if arguments.plot.suffix not in _PLOTS:
            raise UsageError(f"--plot takes a name that ends in {' or '.join(_PLOTS)}, not {arguments.plot}")
        from conveyor.bench.plot import check_installed

        check_installed()


def _spec(arguments: argparse.Namespace) -> Any:
    from conveyor.bench import LoadSpec, Pattern

    streams = arguments.streams
    if streams is None:
        streams = (arguments.connections or 1) if arguments.frames else arguments.sessions
    connections = arguments.connections if arguments.connections is not None else max(1, min(8, streams))
    return LoadSpec(
        model=arguments.model,
        version=arguments.version,
        sessions=arguments.sessions,
        streams=streams,
        connections=connections,
        pattern=Pattern(arguments.pattern),
        rate_per_s=arguments.rate,
        burst_s=arguments.burst_s,
        frames=arguments.frames,
        in_flight=arguments.in_flight,
        shed=arguments.shed,
        time_steps=arguments.chunk,
        echo=arguments.echo,
        integers_below=arguments.integers_below,
        root_certificates=arguments.ca,
        token_file=arguments.token_file,
    )


class _Progress:
    """One line on the terminal, written over and over."""

    def __init__(self) -> None:
        self._before: Snapshot | None = None

    def __call__(self, now: "Snapshot") -> None:
        from conveyor.bench.report import format_progress

        print(f"\r\x1b[K{format_progress(now, self._before)}", end="", file=sys.stderr, flush=True)
        self._before = now

    def wipe(self) -> None:
        """Leaves the line empty."""
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
