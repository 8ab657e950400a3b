"""The flags of `conveyor adopt` that answer its questions.

Invariant: each flag says one thing about one name, and what it says is checked before anything is read.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

import yaml

from conveyor_server.adopt.answers import Answers
from conveyor_server.runner.description import Constant, Value

_T = TypeVar("_T")


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("answers, each as often as there is something to say; names are the graph's")
    said: list[tuple[str, str, Callable[[str], object], str]] = [
        ("--state", "INPUT=OUTPUT", _pair, "an input that is a state, and the output that is its new value"),
        ("--input", "INPUT", str, "an input that is no state: clients send it"),
        ("--output", "OUTPUT", str, "an output that clients get; default: all that are no state"),
        ("--constant", "INPUT=VALUE", _constant, "an input that is the same for all; VALUE is a number or a list"),
        ("--batch-axis", "NAME=AXIS", _axis, "the axis of an input that counts rows"),
        ("--time-axis", "INPUT=AXIS", _axis, "the axis of an input that counts time steps, of which a run takes one"),
        (
            "--shape",
            "NAME=SIZES",
            _shape,
            "one row and time step of an input, such as 45,80; without axes of rows and time, and without the window",
        ),
        (
            "--window",
            "INPUT=SIZE[@AXIS]",
            _window,
            "what a run sees of earlier time steps in front of the new one; AXIS where it could be another",
        ),
        ("--initial", "INPUT=VALUE", _initial, "what a state is in a fresh session; default: 0"),
    ]
    for flag, metavar, kind, text in said:
        group.add_argument(flag, metavar=metavar, type=kind, action="append", default=[], help=text)
    group.add_argument("--stateless", action="store_true", help="no input is a state")
    group.add_argument("--batch", choices=("dynamic", "one"), help="rows of one run; default: what the proof allows")


def answers_of(arguments: argparse.Namespace) -> Answers:
    """What the flags say."""
    return Answers(
        states=_by_name(arguments.state),
        inputs=frozenset(arguments.input),
        outputs=tuple(arguments.output),
        stateless=arguments.stateless,
        batch=arguments.batch,
        batch_axes=_by_name(arguments.batch_axis),
        time_axes=_by_name(arguments.time_axis),
        shapes=_by_name(arguments.shape),
        windows=_by_name(arguments.window),
        constants={item.name: item for item in arguments.constant},
        initial=_by_name(arguments.initial),
    )


def _by_name(items: Sequence[tuple[str, _T]]) -> dict[str, _T]:
    return dict(items)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _axis(text: str) -> tuple[str, int]:
    name, value = _pair(text)
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is no axis: 0 is the first")
    return name, int(value)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, value = _pair(text)
    sizes = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{value!r} is no list of sizes such as 45,80")
    return name, tuple(map(int, sizes))


def _window(text: str) -> tuple[str, tuple[int, int | None]]:
    name, value = _pair(text)
    size, _, axis = value.partition("@")
    if not (size.isdecimal() and int(size) > 0) or (axis and not axis.isdecimal()):
        raise argparse.ArgumentTypeError(f"{value!r} is not SIZE or SIZE@AXIS")
    return name, (int(size), int(axis) if axis else None)


def _constant(text: str) -> Constant:
    name, value = _initial(text)
    return Constant(name, value)


def _initial(text: str) -> tuple[str, Value]:
    name, value = _pair(text)
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = None
    if not _is_value(read):
        raise argparse.ArgumentTypeError(f"{value!r} is no number and no list of numbers")
    return name, read


def _is_value(read: object) -> bool:
    if isinstance(read, list):
        return bool(read) and all(map(_is_value, read))
    return isinstance(read, int | float)
