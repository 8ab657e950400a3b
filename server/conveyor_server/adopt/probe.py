"""What running the file tells of its outputs: how large they are, and which axis counts rows and which time steps.

Invariant: an axis is found by changing the number of rows or of time steps, and seeing which axis follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx
from conveyor_proto.codec import Array

from conveyor_server.adopt.answers import Asked, Refused
from conveyor_server.adopt.original import Original
from conveyor_server.adopt.sample import Samples
from conveyor_server.runner.base import RunFailed
from conveyor_server.runner.description import Description, Output
from conveyor_server.runner.fitting import fit
from conveyor_server.runner.plain import PlainSession

# Not 1 and not 2: sizes that a graph is likely to have by itself.
_ROWS = 3


class Probe:
    """Runs a file in different sizes. One thread.

    Args:
        proto: the file's own graph.
        session: of the file.
        names: of the outputs that clients get.
        example: as of Samples.
    """

    def __init__(
        self, proto: onnx.ModelProto, session: PlainSession, names: Sequence[str], example: Mapping[str, Array]
    ) -> None:
        self._proto, self._session, self._names, self._example = proto, session, names, example

    def outputs(self, description: Description) -> tuple[Description, str]:
        """The description with its outputs, and why runs are one row where it comes to say so.

        Args:
            description: its outputs do not matter.

        Raises:
            Refused: the file does not run as described.
            Asked: no axis of an output counts rows.
        """
        alone = self._run(description, rows=1)
        later = self._later(description)
        if description.batch == "one":
            return replace(description, outputs=self._of_one_row(alone, later)), ""
        try:
            together = self._run(description, rows=_ROWS)
        except Refused as error:
            # Whatever it says of its axes, the size of one row is built into it.
            one = replace(description, batch="one", outputs=self._of_one_row(alone, later))
            return one, f"{_ROWS} rows in one run fail: {error}"
        outputs, ask = [], []
        for name, value, many in zip(self._names, alone, together, strict=True):
            batch_axis = _followed(value.shape, many.shape, 1, _ROWS)
            if batch_axis is None:
                ask.append(
                    f"output {name!r} is {list(value.shape)} for one row and {list(many.shape)} for {_ROWS}, so no "
                    "axis of it counts rows: leave it out by naming those that clients get, --output NAME, or say "
                    "--batch one"
                )
            else:
                outputs.append(_output(name, value.shape, batch_axis, later.get(name)))
        if ask:
            raise Asked(ask)
        return replace(description, outputs=tuple(outputs)), ""

    def _of_one_row(self, alone: Sequence[Array], later: Mapping[str, int]) -> tuple[Output, ...]:
        outputs = []
        for name, value in zip(self._names, alone, strict=True):
            time_axis = later.get(name)
            # Which axis of size 1 is that of rows makes no difference but to the shape that clients see.
            batch_axis = 0 if value.ndim and value.shape[0] == 1 and time_axis != 0 else None
            outputs.append(_output(name, value.shape, batch_axis, time_axis))
        return tuple(outputs)

    def _later(self, description: Description) -> dict[str, int]:
        """Output -> its axis of time steps, where an input has one and the output follows it."""
        if all(item.time_axis is None for item in description.inputs):
            return {}
        one = self._run(description, rows=1)
        try:
            two = self._run(description, rows=1, time_steps=2)
        except Refused:
            return {}  # the time axis is fixed at one step, so no output has another
        shapes = {name: (a.shape, b.shape) for name, a, b in zip(self._names, one, two, strict=True)}
        found = {name: _followed(before, after, 1, 2) for name, (before, after) in shapes.items()}
        return {name: axis for name, axis in found.items() if axis is not None}

    def _run(self, description: Description, *, rows: int, time_steps: int = 1) -> list[Array]:
        fitted = fit(self._proto, replace(description, outputs=()))
        original, samples = Original(self._session, fitted), Samples(fitted.inputs, self._example)
        memories = [original.fresh() for _ in range(rows)]
        try:
            values = original.step(memories, [samples.draw() for _ in memories], self._names, time_steps=time_steps)
        except (RunFailed, IndexError) as error:
            raise Refused(f"the file does not run as it is described: {error}") from error
        for pair in fitted.pairs:
            for memory in memories:
                new = memory.states[pair.state.input]
                if new.shape != pair.layout.shape:
                    raise Refused(
                        f"output {pair.state.output!r} gives rows {list(new.shape)}, and state {pair.state.input!r} "
                        f"takes {list(pair.layout.shape)}: a state is given back as it came"
                    )
        return values


def _output(name: str, shape: Sequence[int], batch_axis: int | None, time_axis: int | None) -> Output:
    row = tuple(size for axis, size in enumerate(shape) if axis not in (batch_axis, time_axis))
    return Output(name, batch_axis, time_axis, row)


def _followed(before: Sequence[int], after: Sequence[int], one: int, many: int) -> int | None:
    """The one axis that went from `one` to `many`, if nothing else changed."""
    if len(before) != len(after):
        return None
    changed = [axis for axis, (was, is_now) in enumerate(zip(before, after, strict=True)) if was != is_now]
    if len(changed) != 1 or (before[changed[0]], after[changed[0]]) != (one, many):
        return None
    return changed[0]
