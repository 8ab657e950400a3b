"""Where a setting's value comes from: flag, then CONVEYOR_* environment, then TOML file, then default.

Invariant: a name that is no setting is an error that says which was probably meant, wherever it was given; a value that
is no good is one that says where it came from.
"""

import argparse
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from conveyor_server.coherence import check_together
from conveyor_server.errors import StartError
from conveyor_server.settings import AUTO, FIELDS, SWITCH, Field, Settings

ENVIRONMENT_PREFIX = "CONVEYOR_"
# What the client's commands take.
_CLIENTS = frozenset(f"{ENVIRONMENT_PREFIX}{name}" for name in ("TARGET", "TOKEN", "TOKEN_FILE"))
# Kubernetes describes a service named `conveyor` to its pods in variables that look like ours.
_KUBERNETES = (f"{ENVIRONMENT_PREFIX}SERVICE_", f"{ENVIRONMENT_PREFIX}PORT_")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and where each comes from.

    Attributes:
        settings: they can be together.
        sources: of those that are given somewhere, by name: the file, the environment, or the command line.
    """

    settings: Settings
    sources: Mapping[str, str]


def resolve(arguments: Sequence[str], environment: Mapping[str, str], prog: str = "conveyor serve") -> Resolved:
    """The settings of a command line.

    Args:
        arguments: flags, without the program's name. `--help` prints and raises SystemExit(0).
        environment: usually os.environ.
        prog: the program's name.

    Raises:
        StartError: a name that is not known, or a value that is no good; the message says where it came from.
    """
    flags = _flags(arguments, prog)
    config = flags.pop("config", None) or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given in (
        (f"{config}", _file(Path(config)) if config else {}),
        ("the environment", _environment(environment)),
        ("the command line", flags),
    ):
        for name, value in given.items():
            values[name] = _convert(FIELDS[name], value, source)
            sources[name] = source
    settings = Settings(**values)
    check_together(settings)
    return Resolved(settings, sources)


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """`resolve`, without where they come from."""
    return resolve(arguments, environment).settings


def environment(settings: Settings) -> dict[str, str]:
    """The variables from which `load` makes these settings again, whatever files say by then."""
    given = {field.name: getattr(settings, field.name) for field in FIELDS.values()}
    return {
        f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in given.items() if value not in {None, ""}
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(f"{message}; see {self.prog} --help")


def _flags(arguments: Sequence[str], prog: str) -> dict[str, str]:
    parser = _Parser(
        prog=prog,
        description="Serves recurrent models, each session's state kept on the server.",
        epilog=f"Every flag is also {ENVIRONMENT_PREFIX}NAME in the environment and name in the TOML file; a flag goes "
        "before the environment, the environment before the file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    for field in FIELDS.values():
        value = field.text(field.default)
        default = f" (default: {value})" if value else ""
        text = (field.doc.help + default).replace("%", "%%")
        # A switch alone turns it on.
        bare: dict[str, Any] = {"nargs": "?", "const": True} if field.type is bool else {}
        parser.add_argument(field.flag, metavar=field.metavar, help=text, **bare)
    known, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        given = argument.partition("=")[0]
        flags = ["--config", *(field.flag for field in FIELDS.values())]
        raise StartError(f"{given} is not a flag of {prog}{_suggestion(given, flags)}")
    return vars(known)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in FIELDS}
    given: dict[str, str] = {}
    for variable, value in environment.items():
        if variable in names and not value.startswith("tcp://"):
            given[names[variable]] = value
        elif (
            variable.startswith(ENVIRONMENT_PREFIX)
            and variable not in {f"{ENVIRONMENT_PREFIX}CONFIG", *names, *_CLIENTS}
            and not variable.startswith(_KUBERNETES)
        ):
            raise StartError(f"{variable} in the environment is not a setting{_suggestion(variable, names)}")
    return given


def _file(path: Path) -> dict[str, Any]:
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise StartError(f"{path} is not TOML: {error}") from error
    for name in given:
        if name not in FIELDS:
            raise StartError(f"{name} in {path} is not a setting{_suggestion(name, FIELDS)}")
    return given


def _convert(field: Field, value: Any, source: str) -> Any:
    where = f"{field.name} = {value!r} from {source}"
    if field.choices:
        if value not in field.choices:
            raise StartError(f"{where} is not one of {', '.join(field.choices)}")
        return value
    if field.doc.auto and value == AUTO:
        return None
    if field.type is str:
        return str(value)
    if field.type is bool:
        return _switch(value, where)
    if field.kind in {int, float}:
        return _number(field, value, where)
    return Path(value)


def _switch(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return {"off": False, "false": False, "0": False, "on": True, "true": True, "1": True}[str(value).lower()]
    except KeyError:
        raise StartError(f"{where} is neither {' nor '.join(SWITCH)}") from None


def _number(field: Field, value: Any, where: str) -> float:
    kind = int if field.kind is int else float
    what = ("a whole number" if kind is int else "a number of seconds") + (f" or {AUTO}" if field.doc.auto else "")
    try:
        number = kind(value)
    except (TypeError, ValueError):
        raise StartError(f"{where} is not {what}") from None
    if isinstance(value, bool) or number != float(value) or not math.isfinite(number):
        raise StartError(f"{where} is not {what}")
    if number < field.doc.least:
        raise StartError(f"{where} is less than {field.doc.least:g}")
    return number


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""
