"""onnxruntime alone: the batched loop that a server can at best come close to.

Invariant: nothing is done between two runs but to swap the two bindings, so that a run's new state is the next run's
state without a copy.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.spec import METADATA_KEY, parse_spec
from conveyor_proto.v1 import spec_pb2

from benchmarks.cases import Case
from benchmarks.figures import Done, Figures, summarize


class BareLoop:
    """One batch size over a session: step after step, one token for each row.

    Args:
        session: an InferenceSession of the step model.
        spec: its description.
        batch: rows.
    """

    def __init__(self, session: Any, spec: spec_pb2.ModelSpec, batch: int) -> None:
        rng = np.random.default_rng(batch)
        states = [
            [_value(np.zeros((batch, *state.shape), to_numpy_dtype(state.dtype))) for state in spec.states]
            for _ in range(2)
        ]
        inputs = {
            item.name: _value(rng.standard_normal((batch, 1, *item.shape)).astype(to_numpy_dtype(item.dtype)))
            for item in spec.inputs
        }
        if spec.lengths_input:
            inputs[spec.lengths_input] = _value(np.ones(batch, np.int32))
        outputs = {
            item.name: _value(np.zeros((batch, 1, *item.shape), to_numpy_dtype(item.dtype))) for item in spec.outputs
        }
        self._run: Callable[[Any], None] = session.run_with_iobinding
        self._bindings = []
        for before, after in (states, states[::-1]):
            binding = session.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            for state, old, new in zip(spec.states, before, after, strict=True):
                binding.bind_ortvalue_input(state.input_name, old)
                binding.bind_ortvalue_output(state.output_name, new)
            self._bindings.append(binding)

    def run(self, seconds: float) -> list[int]:
        """Steps for that long; nanoseconds of each step."""
        run, bindings, clock = self._run, self._bindings, time.perf_counter_ns
        took: list[int] = []
        started = now = clock()
        end = started + int(seconds * 1e9)
        while now < end:
            for binding in bindings:
                run(binding)
                started, now = now, clock()
                took.append(now - started)
        return took


class BareDriver:
    """The loops of all models and batch sizes. See worker.Driver.

    Args:
        repository: models, as MODEL/1/model.onnx.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._sessions: dict[str, Any] = {}
        self._loops: dict[str, BareLoop] = {}
        self._took: list[int] = []

    def open(self, case: Case) -> None:
        """Makes a loop's buffers and warms it."""
        if case.model not in self._sessions:
            self._sessions[case.model] = _open(self._repository / case.model / "1" / "model.onnx")
        session = self._sessions[case.model]
        spec = parse_spec(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        self._loops[case.name] = BareLoop(session, spec, case.sessions)
        self._loops[case.name].run(0.05)

    def run(self, case: Case, seconds: float) -> Done:
        """Steps for that long."""
        self._took = self._loops[case.name].run(seconds)
        return Done(tokens=len(self._took) * case.sessions, messages=len(self._took))

    def figures(self) -> Figures:
        """Of the last run; every row was served in every step."""
        return summarize(np.array(self._took), len(self._took), len(self._took))

    def tend(self) -> None:
        """Nobody else is there."""

    def clear(self) -> None:
        """Forgets the loops' buffers."""
        self._loops.clear()

    def close(self) -> None:
        """Nothing is held outside this process."""


def _open(path: Path) -> Any:
    options = ort.SessionOptions()
    # As the server opens a model for one thread.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _value(array: np.ndarray[Any, Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)
