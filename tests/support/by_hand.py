"""An exported model file in bare onnxruntime, batch 1, its state in numpy: what answers are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from conveyor_proto import spec as specs
from numpy.typing import NDArray

Array = NDArray[Any]


class ByHand:
    """A model file NAME/VERSION/model.onnx that the exporter wrote, with one input and one output."""

    def __init__(self, file: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.spec = specs.parse_spec(self.session.get_modelmeta().custom_metadata_map[specs.METADATA_KEY])

    def begin(self) -> "HandSequence":
        """A sequence from the initial state."""
        return HandSequence(self)

    def run(self, steps: list[Array]) -> list[Array]:
        """The answers to the steps of one whole sequence."""
        sequence = self.begin()
        return [sequence.step(step) for step in steps]


class HandSequence:
    """One sequence, stepped by hand."""

    def __init__(self, model: ByHand) -> None:
        self._model = model
        self._states = {state.name: specs.initial_row(state)[np.newaxis] for state in model.spec.states}

    def step(self, x: Array) -> Array:
        """The answer `[time, ...]` to time steps `[time, ...]`, which move the sequence on."""
        spec = self._model.spec
        (given,), (answer,) = spec.inputs, spec.outputs
        feeds = {given.name: x[np.newaxis], spec.lengths_input: np.array([len(x)], np.int32)}
        feeds |= {state.input_name: self._states[state.name] for state in spec.states}
        names = [answer.name, *(state.output_name for state in spec.states)]
        made = dict(zip(names, self._model.session.run(names, feeds), strict=True))
        self._states = {state.name: made[state.output_name] for state in spec.states}
        return made[answer.name][0]
