"""Runs a captured step model in onnxruntime as the server would, and compares it with PyTorch."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conveyor_export.step_model import Reference, StepModel
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.spec import initial_row
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
BATCH, TIME = 3, 7
# Each row's lengths in a round of ragged calls: some have nothing to do, all end at different places.
ROUNDS = ((2, 0, 5), (0, 3, 1), (5, 1, 0), (0, 3, 1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Stepper:
    """One onnxruntime session over a step model."""

    def __init__(self, model: StepModel) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.spec = model.spec
        self._session = ort.InferenceSession(
            model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def fresh(self, batch: int) -> Arrays:
        return {state.name: np.repeat(initial_row(state)[None], batch, 0) for state in self.spec.states}

    def step(self, inputs: Arrays, lengths: Sequence[int], states: Arrays) -> tuple[Arrays, Arrays]:
        feed = {**inputs, self.spec.lengths_input: np.asarray(lengths, np.int32)}
        feed |= {state.input_name: states[state.name] for state in self.spec.states}
        names = [item.name for item in self.spec.outputs] + [state.output_name for state in self.spec.states]
        made = dict(zip(names, self._session.run(names, feed), strict=True))
        new = {state.name: made[state.output_name] for state in self.spec.states}
        return {item.name: made[item.name] for item in self.spec.outputs}, new

    def cut(self, inputs: Arrays, start: int, stop: int) -> Arrays:
        timed = {item.name for item in self.spec.inputs if item.has_time}
        return {name: value[:, start:stop] if name in timed else value for name, value in inputs.items()}


def _draw(stepper: Stepper, generator: np.random.Generator) -> Arrays:
    inputs = {}
    for item in stepper.spec.inputs:
        shape = (BATCH, TIME, *item.shape) if item.has_time else (BATCH, *item.shape)
        dtype = to_numpy_dtype(item.dtype)
        floats = dtype.kind == "f"
        inputs[item.name] = (
            generator.standard_normal(shape).astype(dtype) if floats else generator.integers(0, 5, shape).astype(dtype)
        )
    return inputs


def _compare(stepper: Stepper, mode: str, outputs: Arrays, states: Arrays, truth: Reference, tolerance: float) -> None:
    for name, value in [*outputs.items(), *states.items()]:
        expected = truth.outputs[name] if name in outputs else truth.states[name]
        assert value.dtype == expected.dtype, (mode, name)
        np.testing.assert_allclose(value, expected, atol=tolerance, rtol=0, err_msg=f"{mode}: {name}")


def _in_chunks(stepper: Stepper, inputs: Arrays, chunks: Sequence[int]) -> tuple[Arrays, Arrays]:
    states, parts, start = stepper.fresh(BATCH), [], 0
    for size in chunks:
        outputs, states = stepper.step(stepper.cut(inputs, start, start + size), [size] * BATCH, states)
        parts.append(outputs)
        start += size
    joined = {
        item.name: np.concatenate([part[item.name] for part in parts], 1) if item.has_time else parts[-1][item.name]
        for item in stepper.spec.outputs
    }
    return joined, states


def _padded(stepper: Stepper, inputs: Arrays, begin: NDArray[np.int64], lengths: Sequence[int]) -> Arrays:
    """The rows' next steps side by side; NaN where a row has none."""
    feed = {}
    for item in stepper.spec.inputs:
        value = inputs[item.name]
        if not item.has_time:
            feed[item.name] = value
            continue
        padded = np.full((BATCH, max(lengths), *item.shape), np.nan if value.dtype.kind == "f" else 0, value.dtype)
        for row, length in enumerate(lengths):
            padded[row, :length] = value[row, begin[row] : begin[row] + length]
        feed[item.name] = padded
    return feed


def _ragged(model: StepModel, stepper: Stepper, inputs: Arrays, tolerance: float) -> None:
    states, begin = stepper.fresh(BATCH), np.zeros(BATCH, np.int64)
    answers: list[dict[str, list[NDArray[np.generic]]]] = [
        {item.name: [] for item in stepper.spec.outputs} for _ in range(BATCH)
    ]
    for lengths in ROUNDS:
        before = states
        outputs, states = stepper.step(_padded(stepper, inputs, begin, lengths), lengths, states)
        for row, length in enumerate(lengths):
            if not length:
                for name, value in states.items():
                    np.testing.assert_array_equal(value[row], before[name][row], err_msg=f"row of length 0: {name}")
                continue
            for item in stepper.spec.outputs:
                value = outputs[item.name][row]
                answers[row][item.name].append(value[:length] if item.has_time else value)
        begin += lengths
    for row, end in enumerate(begin):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        truth = model.reference(stepper.cut(alone, 0, end))
        joined = {
            item.name: (np.concatenate(answers[row][item.name]) if item.has_time else answers[row][item.name][-1])[None]
            for item in stepper.spec.outputs
        }
        last = {name: value[row : row + 1] for name, value in states.items()}
        _compare(stepper, f"ragged row {row}", joined, last, truth, tolerance)


@pytest.fixture
def check_streams() -> Callable[..., None]:
    """check_streams(model): whole, one by one, in chunks and ragged, each against PyTorch."""

    def check(model: StepModel, tolerance: float = 1e-5) -> None:
        stepper = Stepper(model)
        inputs = _draw(stepper, np.random.default_rng(0))
        truth = model.reference(inputs)
        for mode, chunks in (("whole", [TIME]), ("one by one", [1] * TIME), ("chunks", [3, TIME - 3])):
            outputs, states = _in_chunks(stepper, inputs, chunks)
            _compare(stepper, mode, outputs, states, truth, tolerance)
        one = {name: value[:1] for name, value in inputs.items()}
        outputs, states = stepper.step(stepper.cut(one, 0, 1), [1], stepper.fresh(1))
        _compare(stepper, "one row", outputs, states, model.reference(stepper.cut(one, 0, 1)), tolerance)
        _ragged(model, stepper, inputs, tolerance)

    return check
