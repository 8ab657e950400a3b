"""Which axis of a tensor counts rows, and what its other open axes are: by what was said, or by the file's own names.

Invariant: an axis that the file leaves open is explained, or asked about.
"""

from collections.abc import Collection, Iterable

from conveyor_server.adopt.answers import Answers
from conveyor_server.runner.description import Batch, Input, State, Window
from conveyor_server.runner.foreign import Tensor, show_dims

_ROWS = frozenset({"batch", "batch_size", "batchsize", "n", "b", "bs", "batch_dim"})


class Axes:
    """The axes of a file's inputs and states.

    Args:
        tensors: inputs and states, without constants.
        answers: what was said.
        ask: gets a question for each axis that could be anything.
    """

    def __init__(self, tensors: Collection[Tensor], answers: Answers, ask: list[str]) -> None:
        self._answers, self._ask = answers, ask
        self._shared = _shared_symbol(tensors)
        # `one` where the file fixes a tensor's size throughout: a run is one row. Why is told in `one_row`.
        self.batch, self.one_row = self._batch(tensors)

    def of_input(self, tensor: Tensor) -> Input:
        """An input with its axes, as far as they are known."""
        name, dims, answers = tensor.name, tensor.dims, self._answers
        batch_axis, time_axis = self._batch_axis(tensor), answers.time_axes.get(name)
        shape = answers.shapes.get(name)
        if shape is None and dims is None:
            self._ask.append(f"of what shape is one row of input {tensor}? Say --shape {name}=SIZES")
        elif shape is None and dims is not None and self._is_known(batch_axis):
            for axis, dim in enumerate(dims):
                if not isinstance(dim, int) and axis not in (batch_axis, time_axis):
                    self._ask.append(
                        f"what is axis {axis} of input {tensor}: time, of which a run takes one step (--time-axis "
                        f"{name}={axis}), or of one size (--shape {name}=SIZES, of all axes but those of rows and of "
                        "time)?"
                    )
        return Input(name, batch_axis, time_axis, shape, self._window(tensor, batch_axis))

    def of_state(self, tensor: Tensor, target: str) -> State:
        """A state with its axes, as far as they are known.

        Args:
            tensor: the graph's input, with what its output tells of its sizes.
            target: the graph's output.
        """
        name, dims = tensor.name, tensor.dims
        batch_axis, shape = self._batch_axis(tensor), self._answers.shapes.get(name)
        if shape is None and dims is None:
            self._ask.append(f"of what shape is one row of state {tensor}? Say --shape {name}=SIZES")
        elif shape is None and self._is_known(batch_axis) and set(_open_axes(tensor)) - {batch_axis}:
            self._ask.append(
                f"how large is a row of state {tensor}? One that grows cannot be kept; if it is of one size, say "
                f"--shape {name}=SIZES, of all axes but that of rows"
            )
        return State(name, name, target, batch_axis, shape, self._answers.initial.get(name, 0))

    def _is_known(self, batch_axis: int | None) -> bool:
        """The axis of rows is settled; where it is asked about, other axes can wait."""
        return batch_axis is not None or self.batch == "one"

    def _batch(self, tensors: Iterable[Tensor]) -> tuple[Batch, str]:
        if self._answers.batch is not None:
            return self._answers.batch, "as was said" if self._answers.batch == "one" else ""
        said = self._answers.batch_axes
        fixed = [tensor for tensor in tensors if tensor.name not in said and tensor.dims and not _open_axes(tensor)]
        if fixed:
            told = ", ".join(map(str, fixed[:3])) + (" and others" if len(fixed) > 3 else "")
            return "one", f"the file fixes {told}"
        return "dynamic", ""

    def _batch_axis(self, tensor: Tensor) -> int | None:
        """The axis of rows; None where there is none, or where it is asked about."""
        if tensor.name in self._answers.batch_axes:
            return self._answers.batch_axes[tensor.name]
        return self._one_row_axis(tensor) if self.batch == "one" else self._row_axis(tensor)

    def _row_axis(self, tensor: Tensor) -> int | None:
        dims, time_axis = tensor.dims, self._answers.time_axes.get(tensor.name)
        named = self._named(tensor)
        free = [axis for axis in _open_axes(tensor) if axis != time_axis]
        for axes in (named, free):
            if len(axes) == 1:
                return axes[0]
        if dims is None:
            self._ask.append(f"which axis of {tensor} counts rows? Say --batch-axis {tensor.name}=AXIS")
        elif not dims:
            self._ask.append(f"{tensor} has no axis of rows, so it is the same for all: --constant {tensor.name}=VALUE")
        else:
            choices = " or ".join(f"--batch-axis {tensor.name}={axis}" for axis in free or range(len(dims)))
            self._ask.append(f"which axis of {tensor.name} {show_dims(dims)} counts rows? Say {choices}")
        return None

    def _one_row_axis(self, tensor: Tensor) -> int | None:
        """Which of the axes of size 1 it is makes no difference to what is computed, only to the shape that is sent."""
        dims, time_axis = tensor.dims, self._answers.time_axes.get(tensor.name)
        shape = self._answers.shapes.get(tensor.name)
        if not dims or (shape is not None and len(shape) + (time_axis is not None) == len(dims)):
            return None
        named = self._named(tensor)
        if len(named) == 1:
            return named[0]
        return 0 if dims[0] == 1 and time_axis != 0 else None

    def _named(self, tensor: Tensor) -> list[int]:
        """Open axes that the file says to be of rows."""
        symbols = tensor.dims or ()
        return [
            axis
            for axis in _open_axes(tensor)
            if symbols[axis] is not None and (symbols[axis] == self._shared or str(symbols[axis]).lower() in _ROWS)
        ]

    def _window(self, tensor: Tensor, batch_axis: int | None) -> Window | None:
        if tensor.name not in self._answers.windows:
            return None
        size, axis = self._answers.windows[tensor.name]
        if axis is not None:
            return Window(size, axis)
        axes = [axis for axis in range(len(tensor.dims or ())) if axis != batch_axis]
        if len(axes) == 1:
            return Window(size, axes[0])
        choices = " or ".join(f"--window {tensor.name}={size}@{axis}" for axis in axes) or "--window NAME=SIZE@AXIS"
        self._ask.append(f"along which axis of input {tensor} does its window of {size} lie? Say {choices}")
        return None


def _open_axes(tensor: Tensor) -> list[int]:
    return [axis for axis, dim in enumerate(tensor.dims or ()) if not isinstance(dim, int)]


def _shared_symbol(tensors: Iterable[Tensor]) -> str | None:
    """The symbol that stands in every tensor, once, and is the only one that does; None where there is none."""
    found: set[str] | None = None
    for tensor in tensors:
        symbols = [dim for dim in tensor.dims or () if isinstance(dim, str)]
        once = {symbol for symbol in symbols if symbols.count(symbol) == 1}
        found = once if found is None else found & once
    return found.pop() if found is not None and len(found) == 1 else None
