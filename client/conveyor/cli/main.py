"""The `conveyor` command: talks to a server, and finds the commands that other installed parts bring.

Exit codes: 0, done; 1, the server refused or is not there; 2, the command line or its input cannot be understood, or a
part is not installed; 130, interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import conveyor
from conveyor.cli import bench, commands, serving
from conveyor.cli.top import command as top

GROUP = "conveyor.commands"
DEFAULT_TARGET = "localhost:50051"
# What `--help` says of commands that are not imported for it, and the extra that brings each.
_KNOWN = {
    "serve": ("serve a folder of models", "server"),
    "token": ("make a token for the server's access file", "server"),
    "config": ("say what a server would be set to, and by what", "server"),
    "doctor": ("look at what a server would need, and say what to fix", "server"),
    "adopt": ("describe an ONNX file from elsewhere, and prove that it is served as it is", "server"),
    "export": ("make a step model from a trained PyTorch module", "export"),
    "inspect": ("describe a step model's file", "export"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: without the program's name; None: the process's own.

    Returns:
        The exit code; see the module.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    brought = {point.name: point for point in entry_points(group=GROUP)}
    if given and given[0] in brought:
        return _run_brought(brought[given[0]], given[1:])
    arguments = _parser(brought).parse_args(given)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except commands.UsageError as error:
        return _fail(str(error), 2)
    except conveyor.ConveyorError as error:
        return _fail(_sentence(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run_brought(point: EntryPoint, argv: list[str]) -> int:
    try:
        run = point.load()
    except ImportError as error:
        _, extra = _KNOWN.get(point.name, ("", ""))
        needs = f"pip install 'conveyor[{extra}]'" if extra else "a part that is not installed"
        return _fail(f"conveyor {point.name} needs `{needs}` ({error})", 2)
    return int(run(argv) or 0)


def _parser(brought: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conveyor",
        description="Serves recurrent models: the state stays on the server between streaming tokens.",
        epilog="Exit codes: 0 done; 1 refused, or no server; 2 usage, or a part is not installed; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"conveyor {conveyor.__version__}")
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = _common_options()

    _add_models(kinds, common)
    _add_sessions(kinds, common)

    step = kinds.add_parser(
        "step",
        parents=[common],
        help="step a session and print the model's answers",
        description="Steps a session. Without --input and --file, each line of standard input is one input in JSON: a "
        "number or a (nested) list of the shape of one time step or of a chunk, or an object by name where the model "
        "has several inputs.",
    )
    step.add_argument("model", metavar="MODEL", help="the model's name")
    step.add_argument("--version", metavar="V", help="the model's version; default: the latest")
    step.add_argument("--session", metavar="ID", help="go on with this session, or create it, and keep it afterwards")
    source = step.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="JSON", help="one input")
    source.add_argument("--file", metavar="PATH", type=Path, help="one input from .npy, or from .npz by name")
    step.set_defaults(run=commands.step)

    watch = kinds.add_parser(
        "top",
        # Of its own: --target is taken out of them, for one that can be given several times.
        parents=[_common_options()],
        conflict_handler="resolve",
        help="watch what servers are doing: models, sessions, batches, latency",
        description="Shows what servers are doing, again and again; --once prints it for a script. Needs "
        "pip install 'conveyor[top]'.",
    )
    top.add_arguments(watch, os.environ.get("CONVEYOR_TARGET", DEFAULT_TARGET))
    watch.set_defaults(run=top.top)

    load = kinds.add_parser(
        "bench",
        help="put load on a server and measure it",
        description="Puts load on a server and says how fast it answers. Needs pip install 'conveyor[bench]'.",
    )
    bench.add_arguments(load, os.environ.get("CONVEYOR_TARGET", DEFAULT_TARGET))
    load.set_defaults(run=bench.bench)

    for name in sorted(brought):
        text, _ = _KNOWN.get(name, (f"from {brought[name].value.partition(':')[0]}", ""))
        kinds.add_parser(name, add_help=False, help=text)
    return parser


def _add_models(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser) -> None:
    models = kinds.add_parser(
        "models", parents=[common], help="list the models on a server, or bring one in or out of service"
    )
    models.set_defaults(run=commands.models)
    what = models.add_subparsers(title="instead of listing", metavar="[COMMAND]")
    load = what.add_parser(
        "load",
        parents=[_common_options(again=True)],
        help="serve a version from the server's models folder",
        description="Loads, warms and checks a version from the server's models folder, and returns when it is served. "
        "It asks one server: tell each. --timeout-s bounds the wait, not the load.",
    )
    load.add_argument("name", metavar="MODEL", help="the model's name")
    load.add_argument("--version", metavar="V", help="the version; default: the latest in the folder")
    load.add_argument(
        "--reload",
        action="store_true",
        help="load the file anew though the version is served; where it fails, the former one goes on",
    )
    load.set_defaults(run=serving.load)
    unload = what.add_parser(
        "unload",
        parents=[_common_options(again=True)],
        help="take a version out of service",
        description="Takes a version out of service. Its file stays where it is.",
    )
    unload.add_argument("name", metavar="MODEL", help="the model's name")
    unload.add_argument("--version", metavar="V", required=True, help="the version")
    unload.add_argument("--force", action="store_true", help="close the sessions that are on it")
    unload.set_defaults(run=serving.unload)


def _add_sessions(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    sessions = kinds.add_parser(
        "sessions", parents=[common], help="list the sessions on a server and in its store, or move them to a version"
    )
    sessions.add_argument("--model", help="only sessions of this model")
    sessions.set_defaults(run=commands.sessions)
    what = sessions.add_subparsers(title="instead of listing", metavar="[COMMAND]")
    migrate = what.add_parser(
        "migrate",
        parents=[_common_options(again=True)],
        help="move a model's sessions to another of its versions",
        description="Moves a model's sessions to another of its versions, between two of their steps; inputs, outputs "
        "and states must be equal. It asks one server: tell each that has sessions. Those that are in the store alone "
        "move when this server next brings them in.",
    )
    migrate.add_argument("name", metavar="MODEL", help="the model's name")
    migrate.add_argument(
        "--from", dest="from_version", default="", metavar="V", help="the version they leave; default: every other"
    )
    migrate.add_argument(
        "--to", dest="to_version", default="", metavar="V", help="the version they move to; default: the latest"
    )
    migrate.set_defaults(run=commands.migrate)


def _common_options(*, again: bool = False) -> argparse.ArgumentParser:
    """Options of every command. With `again`, those that are not given leave what was given before."""
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("server")
    target = os.environ.get("CONVEYOR_TARGET", DEFAULT_TARGET)
    group.add_argument(
        "--target", default=target, metavar="HOST:PORT", help=f"default: CONVEYOR_TARGET, or {DEFAULT_TARGET}"
    )
    group.add_argument(
        "--timeout-s", type=_positive, default=10.0, metavar="S", help="how long to wait for an answer; default: 10"
    )
    group.add_argument("--tls", action="store_true", help="encrypt, and trust gRPC's own root certificates")
    group.add_argument("--ca", metavar="PEM", help="encrypt, and trust these root certificates")
    group.add_argument("--cert", metavar="PEM", help="the client's certificate, where the server asks for one")
    group.add_argument("--key", metavar="PEM", help="the key to --cert")
    group.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate; default: the host")
    group.add_argument(
        "--token-file",
        metavar="FILE",
        default=os.environ.get("CONVEYOR_TOKEN_FILE"),
        help="file of the bearer token to show; default: CONVEYOR_TOKEN_FILE, or the token in CONVEYOR_TOKEN",
    )
    group.add_argument("--tenant", metavar="NAME", help="act for this tenant, where the caller may act for any")
    common.add_argument("--json", action="store_true", help="print JSON")
    if again:
        for action in common._actions:
            action.default = argparse.SUPPRESS
    return common


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _sentence(error: conveyor.ConveyorError) -> str:
    return " ".join(str(error).split()) + (f" [{error.reason}]" if error.reason else "")


def _fail(message: str, code: int) -> int:
    print(f"conveyor: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
