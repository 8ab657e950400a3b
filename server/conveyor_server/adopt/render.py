"""A description as the text of a model.yaml, with the reasons beside it.

Invariant: what is written reads back as the description that it was written from.
"""

import re
from collections.abc import Mapping, Sequence

from conveyor_server.runner.description import (
    VERSION,
    Constant,
    Description,
    Input,
    Output,
    Start,
    State,
    Value,
    parse_description,
)

# What YAML reads as this very text, whatever stands around it.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")


def render(description: Description, comments: Sequence[str], reasons: Mapping[str, str]) -> str:
    """The text of a model.yaml.

    Args:
        description: what it says.
        comments: lines for its head.
        reasons: state's graph input -> why it is one, said beside it.
    """
    lines = [f"# {_one_line(line)}".rstrip() for line in comments]
    lines += [f"conveyor: {VERSION}", f"batch: {description.batch}"]
    lines += ["inputs:", *(f"  {_text(item.name)}: {_flow(_input(item))}" for item in description.inputs)]
    lines += ["outputs:", *(f"  {_text(item.name)}: {_flow(_output(item))}" for item in description.outputs)]
    if description.states:
        lines.append("states:")
    for state in description.states:
        because = f"  # {_one_line(reasons[state.input])}" if state.input in reasons else ""
        lines.append(f"  - {_flow(_state(state))}{because}")
    if description.constants:
        lines += ["constants:", *(f"  {_text(item.name)}: {_constant(item)}" for item in description.constants)]
    if description.starts:
        lines += ["starts:", *(f"  {_text(item.name)}: {_flow(_start(item))}" for item in description.starts)]
    if description.allow_non_finite_inputs:
        lines.append("allow_non_finite_inputs: true")
    text = "\n".join([*lines, ""])
    if parse_description(text.encode()) != description:
        raise AssertionError(f"a description that does not read back as it was:\n{text}")
    return text


def _input(item: Input) -> dict[str, str]:
    window = {}
    if item.window is not None:
        window = {"window": _flow({"size": str(item.window.size), "axis": str(item.window.axis)})}
    return {**_axes(item.batch_axis, item.time_axis, item.shape), **window}


def _output(item: Output) -> dict[str, str]:
    return _axes(item.batch_axis, item.time_axis, item.shape)


def _state(item: State) -> dict[str, str]:
    names = {"name": _text(item.name), "input": _text(item.input), "output": _text(item.output)}
    return {**names, **_axes(item.batch_axis, None, item.shape), "initial": _value(item.initial)}


def _constant(item: Constant) -> str:
    if item.batch_axis is None:
        return _value(item.value)
    return _flow({"value": _value(item.value), "batch_axis": str(item.batch_axis)})


def _start(item: Start) -> dict[str, str]:
    return {"first": _value(item.first), "later": _value(item.later), **_axes(item.batch_axis, None, None)}


def _axes(batch_axis: int | None, time_axis: int | None, shape: tuple[int, ...] | None) -> dict[str, str]:
    said = {}
    if batch_axis is not None:
        said["batch_axis"] = str(batch_axis)
    if time_axis is not None:
        said["time_axis"] = str(time_axis)
    if shape is not None:
        said["shape"] = f"[{', '.join(map(str, shape))}]"
    return said


def _flow(items: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"


def _value(value: Value) -> str:
    """Numbers as YAML reads them: 1e-07 is text to it, 1.0e-07 is a number."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    if isinstance(value, float) and "e" in text and "." not in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}.0e{exponent}"
    return re.sub(r"e(\d)", r"e+\1", text)


def _text(name: str) -> str:
    words = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
    if _PLAIN.fullmatch(name) and name.lower() not in words:
        return name
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in name)
    return f'"{"".join(escaped)}"'


def _one_line(text: str) -> str:
    """Names of others stand in comments too, and none of them may end one."""
    return "".join(c if c.isprintable() else " " for c in text)
