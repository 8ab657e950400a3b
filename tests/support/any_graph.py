"""Any small graph with states, its axes, dtypes and opset anywhere; and one session of it, stepped by hand.

The truth is the file itself in plain onnxruntime, stepped with arrays in the graph's own layout.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from foreign import IR_BY_OPSET, Graph
from hypothesis import strategies as st

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.int32, np.bool_)
shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@dataclass
class Placed:
    """A tensor of the graph: a row, with axes put in."""

    shape: tuple[int, ...]
    batch_axis: int | None
    time_axis: int | None = None

    @property
    def special(self) -> list[int]:
        return sorted(axis for axis in (self.batch_axis, self.time_axis) if axis is not None)

    def dims(self, rows: int | str, before: dict[int, int] | None = None) -> list[int | str]:
        """The graph's dimensions; `before` adds to the sizes of axes."""
        dims: list[int | str] = list(self.shape)
        for axis in self.special:
            dims.insert(axis, rows if axis == self.batch_axis else 1)
        for axis, more in (before or {}).items():
            dims[axis] = int(dims[axis]) + more
        return dims

    def into(self, row: np.ndarray) -> np.ndarray:
        for axis in self.special:
            row = np.expand_dims(row, axis)
        return row

    def out_of(self, tensor: np.ndarray) -> np.ndarray:
        return np.squeeze(tensor, tuple(self.special))

    def said(self) -> dict[str, Any]:
        axes = {"batch_axis": self.batch_axis, "time_axis": self.time_axis}
        return {"shape": list(self.shape), **{key: axis for key, axis in axes.items() if axis is not None}}

    def to_canonical(self) -> list[int]:
        rest = [axis for axis in range(len(self.shape) + len(self.special)) if axis not in self.special]
        return [axis for axis in (self.batch_axis, self.time_axis) if axis is not None] + rest


@st.composite
def placed(draw: st.DrawFn, *, one_row: bool, timed: bool, shape: tuple[int, ...] | None = None) -> Placed:
    shape = draw(shapes) if shape is None else shape
    counts_rows = not one_row or draw(st.booleans())
    axes = draw(st.permutations(range(len(shape) + counts_rows + timed)))
    return Placed(shape, axes[0] if counts_rows else None, axes[-1] if timed else None)


@dataclass
class State:
    """A state of the graph, and how it goes on."""

    at: Placed
    dtype: Any
    initial: Any
    pace: float


@dataclass
class Case:
    """A graph and what is said of it."""

    opset: int
    one_row: bool
    x: Placed
    window: tuple[int, int] | None
    y: Placed
    states: list[State]
    ready: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    one_row, timed = draw(st.booleans()), draw(st.booleans())
    x = draw(placed(one_row=one_row, timed=timed))
    axes = [axis for axis in range(len(x.dims(1))) if axis != x.batch_axis]
    window = draw(st.none() | st.tuples(st.integers(1, 3), st.sampled_from(axes))) if axes else None
    states = []
    for index in range(draw(st.integers(0, 3))):
        at, dtype = draw(placed(one_row=one_row, timed=False)), draw(st.sampled_from(DTYPES))
        whole = np.arange(int(np.prod(at.shape)), dtype=np.float64).reshape(at.shape).astype(dtype)
        initial = draw(st.sampled_from([0, 1, whole.tolist()]))
        states.append(State(at, dtype, initial, 0.5 + 0.25 * index))
    y = draw(placed(one_row=one_row, timed=timed, shape=(2,)))
    return Case(draw(st.sampled_from(sorted(IR_BY_OPSET))), one_row, x, window, y, states, draw(st.booleans()))


def build(case: Case) -> Graph:
    graph, rows = Graph(case.opset), 1 if case.one_row else "rows"
    before = {case.window[1]: case.window[0]} if case.window else {}
    x = graph.input("x", np.float32, case.x.dims(rows, before))
    flat = _flat(graph, x, case.x)
    last = graph.node("Slice", [flat, *(graph.weight(np.array([bound])) for bound in (-1, 1 << 40, 1))])
    first = _first(graph, flat)
    if case.ready:
        graph.input("ready", np.int32, [rows, 1])
        first = graph.node("Mul", [first, graph.node("Cast", ["ready"], to=1)])
    total = first
    for index, state in enumerate(case.states):
        graph.input(f"s{index}", state.dtype, state.at.dims(rows))
        old = _flat(graph, f"s{index}", state.at)
        new = _next(graph, old, first, state)
        canonical = graph.node("Reshape", [new, graph.weight(np.array([-1, *state.at.shape]))])
        _place(graph, canonical, state.at, f"t{index}")
        graph.output(f"t{index}", state.dtype, state.at.dims(rows))
        total = graph.node("Add", [total, graph.node("Cast", [_first(graph, new)], to=1)])
    both = graph.node("Concat", [total, last], axis=1)
    if case.y.time_axis is not None:
        both = graph.node("Unsqueeze", [both, graph.weight(np.array([1]))])
    _place(graph, both, case.y, "y")
    graph.output("y", np.float32, case.y.dims(rows))
    return graph


def _flat(graph: Graph, name: str, at: Placed) -> str:
    value, order = name, at.to_canonical()
    if order != sorted(order):
        value = graph.node("Transpose", [value], perm=order)
    shape = [-1, 1] if not order else [0, -1]
    if at.batch_axis is None:
        shape = [1, -1]
    elif len(order) == 1:
        shape = [-1, 1]
    return graph.node("Reshape", [value, graph.weight(np.array(shape))])


def _first(graph: Graph, flat: str) -> str:
    return graph.node("Slice", [flat, *(graph.weight(np.array([bound])) for bound in (0, 1, 1))])


def _next(graph: Graph, old: str, first: str, state: State) -> str:
    kind = np.dtype(state.dtype).kind
    if kind == "b":
        return graph.node("Xor", [old, graph.node("Greater", [first, graph.weight(np.float32(0))])])
    loud = graph.node("Mul", [first, graph.weight(np.float32(8 * state.pace))])
    element = {"float32": 1, "float64": 11, "float16": 10, "int64": 7, "int32": 6}[np.dtype(state.dtype).name]
    moved = graph.node("Cast", [graph.node("Floor", [loud]) if kind == "i" else loud], to=element)
    kept = graph.node("Mul", [old, graph.weight(np.asarray(state.pace, state.dtype))]) if kind == "f" else old
    return graph.node("Add", [kept, moved])


def _place(graph: Graph, canonical: str, at: Placed, name: str) -> None:
    """From `[rows, (time), *shape]` to where the graph has it."""
    order = at.to_canonical()
    if at.batch_axis is None:
        canonical = graph.node("Squeeze", [canonical, graph.weight(np.array([0]))])
    if order == sorted(order):
        graph.node("Identity", [canonical], name)
    else:
        graph.node("Transpose", [canonical], name, perm=[order.index(axis) for axis in range(len(order))])


def describe(case: Case) -> str:
    """JSON is YAML."""
    x = case.x.said()
    if case.window:
        x["window"] = {"size": case.window[0], "axis": case.window[1]}
    states = [
        {"name": f"state.{index}", "input": f"s{index}", "output": f"t{index}", "initial": state.initial}
        | {key: value for key, value in state.at.said().items() if key != "time_axis"}
        for index, state in enumerate(case.states)
    ]
    constants = {"ready": {"value": 1, "batch_axis": 0}} if case.ready else {}
    batch = "one" if case.one_row else "dynamic"
    said = {"conveyor": 1, "batch": batch, "inputs": {"x": x}, "outputs": {"y": case.y.said()}}
    return json.dumps({**said, "states": states, "constants": constants})


class Alone:
    """One session in the file itself."""

    def __init__(self, case: Case, session: ort.InferenceSession) -> None:
        self.case, self.session = case, session
        self.states = [
            state.at.into(np.broadcast_to(np.asarray(state.initial, state.dtype), state.at.shape))
            for state in case.states
        ]
        self.seen: np.ndarray | None = None

    def step(self, row: np.ndarray) -> np.ndarray:
        x = self.case.x.into(np.asarray(row))
        if self.case.window:
            size, axis = self.case.window
            if self.seen is None:
                self.seen = np.zeros([size if at == axis else length for at, length in enumerate(x.shape)], x.dtype)
            x = np.concatenate([self.seen, x], axis)
            self.seen = np.take(x, range(x.shape[axis] - size, x.shape[axis]), axis)
        feeds = {"x": x} | {f"s{index}": value for index, value in enumerate(self.states)}
        if self.case.ready:
            feeds["ready"] = np.ones((1, 1), np.int32)
        y, *self.states = self.session.run(["y", *(f"t{index}" for index in range(len(self.states)))], feeds)
        return self.case.y.out_of(y)
