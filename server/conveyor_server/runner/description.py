"""`model.yaml`: what a person says about an ONNX file that Conveyor did not export.

Invariant: a Description says one thing about each name and nothing twice; all axes in it count those of the graph's own
tensors. Whether it fits the graph is for `adopted` to find out. Nothing here looks at a graph.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

import yaml

from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.strict_yaml import Mapping, NotStrict, load

FILE_NAME = "model.yaml"
VERSION = 1
# A description is names and numbers; a row of initial state that needs more belongs into the graph.
MAX_BYTES = 1 << 20
_MAX_RANK = 16
_MAX_SIZE = 1 << 31

Batch = Literal["dynamic", "company", "one"]
# A number, or a nested list of them.
Value: TypeAlias = "float | int | bool | list[Value]"


@dataclass(frozen=True, slots=True)
class Window:
    """What a run sees of earlier time steps of an input, in front of the new one.

    Attributes:
        size: how much of them.
        axis: along which axis of the graph's tensor.
    """

    size: int
    axis: int


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input that a client sends.

    Attributes:
        name: of the graph input.
        batch_axis: its axis of rows; None: it has none, because a run is one row.
        time_axis: its axis of time steps; None: it has none, because a run is one time step.
        shape: of one row and time step, without those axes and without the window; None: as the graph has it.
        window: what it keeps of earlier time steps.
    """

    name: str
    batch_axis: int | None = None
    time_axis: int | None = None
    shape: tuple[int, ...] | None = None
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A graph output that a client gets; the fields are as of Input."""

    name: str
    batch_axis: int | None = None
    time_axis: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A graph input that takes what a graph output gave in the time step before.

    Attributes:
        name: what clients and snapshots call it.
        input: the graph input.
        output: the graph output.
        batch_axis: axis of rows of both; None: they have none, because a run is one row.
        shape: of one row, without that axis; None: as the graph has it.
        initial: what a fresh session begins with: one number for all of the row, or the row.
    """

    name: str
    input: str
    output: str
    batch_axis: int | None = None
    shape: tuple[int, ...] | None = None
    initial: Value = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """A graph input that is the same for every session and time step.

    Attributes:
        name: of the graph input.
        value: one number for all of it, or the whole; with a batch axis, of one row.
        batch_axis: axis along which the value is repeated for each row; None: it is the same tensor for any batch.
    """

    name: str
    value: Value
    batch_axis: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """A graph input that tells a session's first time step from its later ones.

    Attributes:
        name: of the graph input.
        first: what it is in a session's first time step: one number, or a row.
        later: what it is afterwards.
        batch_axis: its axis of rows; None: it has none, because a run is one row.
    """

    name: str
    first: Value = 1
    later: Value = 0
    batch_axis: int | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """All of a model.yaml.

    Attributes:
        inputs: what clients send, in the order of the file.
        outputs: what clients get, in the order of the file.
        states: what a session keeps, in the order of the file.
        constants: graph inputs that never change.
        starts: graph inputs that tell a session's first time step.
        batch: `dynamic`: a run takes any number of rows. `company`: a row that would be alone runs beside an empty one.
            `one`: a run is one row.
        allow_non_finite_inputs: accept NaN and infinities from clients.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    states: tuple[State, ...] = ()
    constants: tuple[Constant, ...] = ()
    starts: tuple[Start, ...] = ()
    batch: Batch = "dynamic"
    allow_non_finite_inputs: bool = False


def read_description(path: Path) -> Description:
    """Reads a model.yaml. Any thread; blocks on the disk.

    Raises:
        RunnerUnavailable: it cannot be read, or says something that is not known, twice, or of the wrong kind.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RunnerUnavailable(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        return parse_description(content)
    except NotStrict as error:
        raise RunnerUnavailable(f"{path.name}: {error}") from error


def parse_description(content: bytes) -> Description:
    """The description that the bytes of a model.yaml hold.

    Raises:
        NotStrict: it says something that is not known, twice, or of the wrong kind.
    """
    if len(content) > MAX_BYTES:
        raise NotStrict(f"it has more than {MAX_BYTES} bytes: a description is names and numbers")
    try:
        top = Mapping.of(load(content.decode()), "the file")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise NotStrict(f"it is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise NotStrict("it is not a description: its lists lie too deep in each other") from None
    version = top.integer("conveyor", least=0)
    if version != VERSION:
        raise NotStrict(f"conveyor: {version} is not a version of this file that is known here; write {VERSION}")
    batch = top.choice("batch", get_args(Batch))
    rows_need_axis = batch != "one"
    described = Description(
        inputs=tuple(_input(name, item, rows_need_axis) for name, item in top.mappings("inputs")),
        outputs=tuple(_output(name, item, rows_need_axis) for name, item in top.mappings("outputs")),
        states=tuple(_state(item, rows_need_axis) for item in top.list_of_mappings("states")),
        constants=tuple(_constant(name, value) for name, value in top.items_of("constants")),
        starts=tuple(_start(name, item, rows_need_axis) for name, item in top.mappings("starts", optional=True)),
        batch=cast("Batch", batch),
        allow_non_finite_inputs=top.flag("allow_non_finite_inputs"),
    )
    top.end()
    _check_names(described)
    return described


def _input(name: str, item: Mapping, rows_need_axis: bool) -> Input:
    batch_axis, time_axis = _axes(item, rows_need_axis)
    window = None
    inner = item.mapping("window")
    if inner is not None:
        window = Window(inner.integer("size", least=1, most=_MAX_SIZE), inner.integer("axis", least=0, most=_MAX_RANK))
        if window.axis == batch_axis:
            raise NotStrict(f"{inner.where}: axis {window.axis} counts rows; a window lies along another")
        inner.end()
    shape = _shape(item)
    item.end()
    return Input(name, batch_axis, time_axis, shape, window)


def _output(name: str, item: Mapping, rows_need_axis: bool) -> Output:
    batch_axis, time_axis = _axes(item, rows_need_axis)
    shape = _shape(item)
    item.end()
    return Output(name, batch_axis, time_axis, shape)


def _state(item: Mapping, rows_need_axis: bool) -> State:
    source, target = item.text("input"), item.text("output")
    state = State(
        name=item.text("name", source),
        input=source,
        output=target,
        batch_axis=_axis(item, "batch_axis", needed=rows_need_axis),
        shape=_shape(item),
        initial=_value(item.get("initial", 0), f"{item.where}.initial"),
    )
    item.end()
    return state


def _constant(name: str, value: object) -> Constant:
    where = f"constants.{name}"
    if not isinstance(value, dict):
        return Constant(name, _value(value, where))
    item = Mapping.of(value, where)
    constant = Constant(name, _value(item.get("value"), f"{where}.value"), _axis(item, "batch_axis", needed=False))
    item.end()
    return constant


def _start(name: str, item: Mapping, rows_need_axis: bool) -> Start:
    start = Start(
        name,
        first=_value(item.get("first", 1), f"{item.where}.first"),
        later=_value(item.get("later", 0), f"{item.where}.later"),
        batch_axis=_axis(item, "batch_axis", needed=rows_need_axis),
    )
    item.end()
    return start


def _axes(item: Mapping, rows_need_axis: bool) -> tuple[int | None, int | None]:
    batch_axis, time_axis = _axis(item, "batch_axis", needed=rows_need_axis), _axis(item, "time_axis", needed=False)
    if batch_axis is not None and batch_axis == time_axis:
        raise NotStrict(f"{item.where}: axis {batch_axis} cannot count both rows and time steps")
    return batch_axis, time_axis


def _axis(item: Mapping, key: str, *, needed: bool) -> int | None:
    if key in item:
        return item.integer(key, least=0, most=_MAX_RANK)
    if needed:
        raise NotStrict(f"{item.where} has no {key}: say which axis of the graph's tensor counts rows (0 is the first)")
    return None


def _shape(item: Mapping) -> tuple[int, ...] | None:
    if "shape" not in item:
        return None
    shape = item.integers("shape", least=1, most=_MAX_SIZE)
    if len(shape) > _MAX_RANK:
        raise NotStrict(f"{item.where}.shape has {len(shape)} axes; at most {_MAX_RANK} are taken")
    return tuple(shape)


def _value(value: object, where: str) -> Value:
    """A number or a nested list of numbers, all of them finite."""
    if isinstance(value, list) and value:
        return [_value(item, where) for item in value]
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise NotStrict(f"{where} takes a finite number or a list of them, and {value!r:.80} is there")


def _check_names(described: Description) -> None:
    taken = [
        *(item.name for item in described.inputs),
        *(item.input for item in described.states),
        *(item.name for item in described.constants),
        *(item.name for item in described.starts),
    ]
    _once(taken, "graph input", "is an input, a state, a constant or a start, and one of them only")
    _once([item.output for item in described.states], "graph output", "is the new value of one state only")
    _once([item.name for item in described.states], "state", "is a name for one state only")
    if not described.inputs:
        raise NotStrict("inputs is empty: a model that is stepped takes something")
    if not described.outputs:
        raise NotStrict("outputs is empty: a model that is stepped answers something")


def _once(names: Iterable[str], what: str, rule: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise NotStrict(f"{what} {name!r} is there twice: it {rule}")
        seen.add(name)
