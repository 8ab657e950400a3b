"""What PyTorch says, and how far a graph is from it.

Invariant: a NaN on either side is an infinite difference, and equal infinities are none.
"""

from dataclasses import dataclass

import numpy as np
from conveyor_proto.codec import Array

from conveyor_export.errors import VerificationFailed
from conveyor_export.step_model import Reference, StepModel
from conveyor_export.verify_inputs import Sample, cut


class Truth:
    """PyTorch's answers for one sample, each asked for once and only when needed.

    Attributes:
        single: rows are asked about each as a batch of its own. A batch in PyTorch has one length, so this is how rows
            of different lengths get their truth.
    """

    def __init__(self, model: StepModel, sample: Sample, *, single: bool = False) -> None:
        self.sample = sample
        self.single = single
        self._model = model
        self._known: dict[tuple[int | None, int], Reference] = {}

    def output(self, name: str, row: int, time: int) -> Array:
        """A row's output `[time, *shape]` or `[*shape]` over its first `time` time steps from fresh state."""
        answer: Array = self._answer(row, time).outputs[name][0 if self.single else row]
        return answer

    def state(self, name: str, row: int, time: int) -> Array:
        """A row's state `[*shape]` after its first `time` time steps."""
        answer: Array = self._answer(row, time).states[name][0 if self.single else row]
        return answer

    def _answer(self, row: int, time: int) -> Reference:
        key = row if self.single else None, time
        if key not in self._known:
            self._known[key] = self.ask(*key)
        return self._known[key]

    def ask(self, row: int | None, time: int) -> Reference:
        """Runs the module on one row or on all of them, afresh.

        Raises:
            VerificationFailed: the module itself cannot take this batch or time, or answers with other names.
        """
        rows = slice(None) if row is None else [row]
        inputs = cut(self._model.spec, self.sample.inputs, rows, time)
        try:
            answer = self._model.reference(inputs)
        except Exception as error:
            batch = self.sample.batch if row is None else 1
            raise VerificationFailed(
                f"PyTorch's own run of the module on a batch of {batch} and {time} time steps "
                f"({self.sample.kind} inputs) raised {type(error).__name__}: {error}\n"
                "A step model takes any batch and any time: look for sizes that forward() takes as fixed."
            ) from error
        spec = self._model.spec
        wanted = {item.name for item in spec.outputs}, {state.name for state in spec.states}
        found = set(answer.outputs), set(answer.states)
        if wanted != found:
            raise VerificationFailed(f"the module answers with {found}, and the model's description names {wanted}")
        return answer

    def finite(self) -> bool:
        """Whether everything that the module says of the whole sample (of its first row, if `single`) is finite."""
        answer = self._answer(0, self.sample.time)
        arrays = [*answer.outputs.values(), *answer.states.values()]
        return all(bool(np.isfinite(array).all()) for array in arrays if np.issubdtype(array.dtype, np.floating))


@dataclass(slots=True)
class Figure:
    """How far one tensor was from its truth in one mode.

    Attributes:
        difference: the largest absolute difference, in float64.
        time_steps: positions compared.
        where: the row and time step of the largest difference.
        scale: the largest absolute value expected.
        nan: `PyTorch`, `onnxruntime` or empty: who gave NaN first.
    """

    mode: str
    inputs: str
    tensor: str
    difference: float = 0.0
    time_steps: int = 0
    where: str = ""
    scale: float = 0.0
    nan: str = ""


class Tally:
    """The figures of one mode on one kind of inputs."""

    def __init__(self, mode: str, inputs: str, tensors: list[str]) -> None:
        self.mode = mode
        self.inputs = inputs
        self.figures = {tensor: Figure(mode, inputs, tensor) for tensor in tensors}

    def compare(self, tensor: str, expected: Array, got: Array, where: str, first_step: int | None = None) -> None:
        """Takes one more comparison into the tensor's figure.

        Args:
            tensor: output or state name.
            expected: `[time, *shape]` where `first_step` is given, else `[*shape]`.
            got: the same shape.
            where: the row, for a person.
            first_step: the first of the compared time steps in the whole sequence.

        Raises:
            VerificationFailed: shapes or dtypes differ.
        """
        if expected.shape != got.shape or expected.dtype != got.dtype:
            raise VerificationFailed(
                f"mode {self.mode}: {tensor!r} is {expected.dtype} {list(expected.shape)} for a row in PyTorch, "
                f"and {got.dtype} {list(got.shape)} in the captured graph"
            )
        figure = self.figures[tensor]
        figure.time_steps += 1 if first_step is None else len(expected)
        if not expected.size:
            return
        difference, nan = _difference(expected, got)
        worst = np.unravel_index(int(difference.argmax()), difference.shape)
        finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
        figure.scale = max(figure.scale, float(finite.max(initial=0.0)))
        figure.nan = figure.nan or nan
        if not figure.where or difference[worst] > figure.difference:
            figure.difference = float(difference[worst])
            figure.where = where if first_step is None else f"{where}, time step {first_step + int(worst[0])}"


def _difference(expected: Array, got: Array) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], str]:
    left, right = expected.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(left == right, 0.0, np.abs(left - right))
    nan = "PyTorch" if np.isnan(left).any() else "onnxruntime" if np.isnan(right).any() else ""
    return np.where(np.isnan(difference), np.inf, difference), nan
