"""The captured graph as the server runs it: onnxruntime on one CPU thread, state in, state out.

Invariant: what this runs is the graph alone. Nothing here fills a gap that the graph leaves, so a graph that needs
help fails its verification.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.spec import initial_row
from numpy.typing import NDArray

from conveyor_export.errors import VerificationFailed
from conveyor_export.package_graph import MAX_INLINE_BYTES, externalize, weights_bytes
from conveyor_export.step_model import Arrays, StepModel

# Before the import: the library reads it once.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort


@dataclass(frozen=True, slots=True)
class Call:
    """One run of the graph.

    Attributes:
        starts: int64 `[batch]`, the first time step of each row's chunk in its whole sequence.
        lengths: int32 `[batch]`, time steps of each row's chunk, 0 or more.
        outputs: ModelSpec.outputs by name; beyond a row's length they hold anything.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    outputs: Arrays


class Graph:
    """A step model's graph in onnxruntime. One thread at a time.

    Attributes:
        states: ModelSpec.states by name, `[batch, *shape]`, after the last call of the last `play`.
    """

    def __init__(self, model: StepModel) -> None:
        self.spec = model.spec
        self.states: dict[str, Array] = {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # Errors come back as exceptions; what onnxruntime would print beside them says no more.
        options.log_severity_level = 4
        try:
            self._session = _load(model, options)
        except Exception as error:
            raise VerificationFailed(f"onnxruntime cannot load the captured graph: {error}") from error
        self._check_names()

    def _check_names(self) -> None:
        spec = self.spec
        inputs = [item.name for item in spec.inputs] + [state.input_name for state in spec.states]
        outputs = [item.name for item in spec.outputs] + [state.output_name for state in spec.states]
        if not spec.lengths_input:
            raise VerificationFailed("the captured graph has no `lengths` input, so rows cannot differ in time steps")
        for what, wanted, found in (
            ("inputs", [*inputs, spec.lengths_input], [item.name for item in self._session.get_inputs()]),
            ("outputs", outputs, [item.name for item in self._session.get_outputs()]),
        ):
            if sorted(wanted) != sorted(found):
                raise VerificationFailed(f"the captured graph's {what} are {found}, and its description says {wanted}")

    def play(
        self, inputs: Arrays, schedule: NDArray[np.int32], rng: np.random.Generator, *, nan_padding: bool = True
    ) -> Iterator[Call]:
        """Feeds sequences chunk by chunk from fresh state, carrying the state from call to call.

        Args:
            inputs: whole sequences by name, `[batch, time, *shape]`, or `[batch, *shape]` without time.
            schedule: int32 `[calls, batch]`, time steps that each row takes in each call; no call is all zeros.
            rng: chooses the padding.
            nan_padding: pad float inputs with NaN; else, as integers always, with values that the input holds.

        Raises:
            VerificationFailed: onnxruntime refused a call.
        """
        batch = schedule.shape[1]
        self.states = {state.name: np.stack([initial_row(state)] * batch) for state in self.spec.states}
        starts = np.zeros(batch, np.int64)
        pad = partial(_padding, rng=rng, nan=nan_padding)
        for lengths in schedule:
            outputs = self._call(self._chunk(inputs, starts, lengths, pad), lengths)
            yield Call(starts.copy(), lengths, outputs)
            starts += lengths

    def _chunk(
        self,
        inputs: Arrays,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        pad: Callable[[Array, int], Array],
    ) -> dict[str, Array]:
        chunk = {}
        for item in self.spec.inputs:
            whole = inputs[item.name]
            if not item.has_time:
                chunk[item.name] = whole
                continue
            padded = pad(whole, int(lengths.max()))
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                padded[row, :length] = whole[row, start : start + length]
            chunk[item.name] = padded
        return chunk

    def _call(self, feed: dict[str, Array], lengths: NDArray[np.int32]) -> dict[str, Array]:
        for state in self.spec.states:
            feed[state.input_name] = self.states[state.name]
        feed[self.spec.lengths_input] = lengths
        names = [item.name for item in self.spec.outputs] + [state.output_name for state in self.spec.states]
        try:
            results = dict(zip(names, self._session.run(names, feed), strict=True))
        except Exception as error:
            shapes = {name: list(array.shape) for name, array in feed.items()}
            raise VerificationFailed(
                f"onnxruntime refused the captured graph's inputs {shapes} (lengths {lengths.tolist()}): {error}"
            ) from error
        self.states = {state.name: results[state.output_name] for state in self.spec.states}
        return {item.name: results[item.name] for item in self.spec.outputs}


def onnxruntime_version() -> str:
    """The version of the onnxruntime that verifies."""
    return str(ort.__version__)


def _load(model: StepModel, options: ort.SessionOptions) -> ort.InferenceSession:
    providers = ["CPUExecutionProvider"]
    if weights_bytes(model.proto) <= MAX_INLINE_BYTES:
        return ort.InferenceSession(model.proto.SerializeToString(), options, providers=providers)
    # A protobuf message ends at 2 GB. The folder can go at once: the session has the weights in memory or mapped.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(externalize(model.proto, file.with_name("weights.data")).SerializeToString())
        return ort.InferenceSession(str(file), options, providers=providers)


def _padding(whole: Array, time: int, *, rng: np.random.Generator, nan: bool) -> Array:
    """`[batch, time, *shape]` of what must influence nothing."""
    shape = (whole.shape[0], time, *whole.shape[2:])
    if nan and np.issubdtype(whole.dtype, np.floating):
        return np.full(shape, np.nan, whole.dtype)
    return np.asarray(rng.choice(whole.reshape(-1), size=shape), whole.dtype)
