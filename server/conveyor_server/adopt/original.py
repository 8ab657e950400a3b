"""The file itself, stepped by hand: what its maker's own loop does, in numpy and plain onnxruntime.

Invariant: nothing of what is served is used here. A session's memory is rows; a call puts them where the graph wants
them and takes them out again, one row beside the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from conveyor_proto.codec import Array

from conveyor_server.runner.fitting import Fitted
from conveyor_server.runner.layout import Layout
from conveyor_server.runner.plain import PlainSession


@dataclass(slots=True)
class Memory:
    """What one session keeps between time steps.

    Attributes:
        states: graph input -> row `[*shape]`.
        windows: graph input -> what was seen last, in the graph's axes without those of rows and time.
        begun: it has taken a time step.
    """

    states: dict[str, Array]
    windows: dict[str, Array] = field(default_factory=dict)
    begun: bool = False


class Original:
    """Steps sessions through the file as it is. One thread.

    Args:
        session: of the file.
        fitted: what is said of it; its outputs may be missing.
    """

    def __init__(self, session: PlainSession, fitted: Fitted) -> None:
        self._session = session
        self._fitted = fitted

    def fresh(self) -> Memory:
        """A session that has not begun."""
        return Memory({pair.state.input: pair.initial.copy() for pair in self._fitted.pairs})

    def step(
        self,
        memories: Sequence[Memory],
        inputs: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        *,
        time_steps: int = 1,
    ) -> list[Array]:
        """One call of the file for some sessions together, whose memories go on.

        Args:
            memories: of the sessions; one for a file whose runs are one row.
            inputs: of each session, graph input -> row `[*shape]` of one time step.
            names: graph outputs.
            time_steps: how often the time step is given in inputs that have a time axis.

        Returns:
            The outputs as the file gives them.

        Raises:
            RunFailed: onnxruntime failed.
        """
        feeds = dict(self._constants(len(memories)))
        for layout in self._fitted.inputs:
            rows = [self._seen(layout, memory, row[layout.name]) for memory, row in zip(memories, inputs, strict=True)]
            feeds[layout.name] = _together(layout, rows, time_steps)
        for pair in self._fitted.pairs:
            feeds[pair.state.input] = _together(pair.layout, [memory.states[pair.state.input] for memory in memories])
        for layout, first, later in self._fitted.starts:
            feeds[layout.name] = _together(layout, [later if memory.begun else first for memory in memories])
        news = [pair.state.output for pair in self._fitted.pairs]
        values = self._session.run([*names, *news], feeds)
        for pair, value in zip(self._fitted.pairs, values[len(names) :], strict=True):
            for index, memory in enumerate(memories):
                memory.states[pair.state.input] = row_of(value, pair.layout.batch_axis, index).copy()
        for memory in memories:
            memory.begun = True
        return values[: len(names)]

    def _constants(self, rows: int) -> dict[str, Array]:
        constants = self._fitted.description.constants
        return {
            item.name: self._fitted.constants[item.name]
            if item.batch_axis is None
            else np.repeat(self._fitted.constants[item.name], rows, item.batch_axis)
            for item in constants
        }

    @staticmethod
    def _seen(layout: Layout, memory: Memory, row: Array) -> Array:
        """What a call sees of an input: the window, and the row behind it; keeps the newest of both for the next."""
        if layout.window is None:
            return row
        special = [axis for axis in (layout.batch_axis, layout.time_axis) if axis is not None]
        if layout.window.axis == layout.time_axis:
            before = memory.windows.get(layout.name, np.zeros((layout.window.size, *row.shape), row.dtype))
            seen = np.concatenate([before, row[np.newaxis]])
            memory.windows[layout.name] = seen[1:]
            return seen
        axis = layout.window.axis - sum(other < layout.window.axis for other in special)
        shape = list(row.shape)
        shape[axis] = layout.window.size
        seen = np.concatenate([memory.windows.get(layout.name, np.zeros(shape, row.dtype)), row], axis)
        newest = np.arange(seen.shape[axis] - layout.window.size, seen.shape[axis])
        memory.windows[layout.name] = seen.take(newest, axis)
        return seen


def row_of(value: Array, axis: int | None, index: int) -> Array:
    """Row `index` of a tensor of the graph; all of it where it has no axis of rows."""
    return value if axis is None else np.take(value, index, axis)


def _together(layout: Layout, rows: Sequence[Array], time_steps: int = 1) -> Array:
    """The graph's tensor of some rows: each with axes of size 1 where the layout has rows and time, side by side."""
    windowed = layout.window is not None and layout.window.axis == layout.time_axis
    special = {layout.batch_axis} if windowed else {layout.batch_axis, layout.time_axis}
    expanded = []
    for row in rows:
        value = row
        if windowed and layout.time_axis is not None:
            # Its first axis is that of time already; with the axis of rows still missing.
            before = layout.batch_axis is not None and layout.batch_axis < layout.time_axis
            value = np.moveaxis(row, 0, layout.time_axis - before)
        for axis in sorted(axis for axis in special if axis is not None):
            value = np.expand_dims(value, axis)
        if time_steps > 1 and layout.time_axis is not None:
            value = np.repeat(value, time_steps, layout.time_axis)
        expanded.append(value)
    if layout.batch_axis is None:
        (only,) = expanded
        return np.asarray(only)  # numpy makes a scalar of what has no axes, and onnxruntime takes none
    return np.concatenate(expanded, layout.batch_axis)
