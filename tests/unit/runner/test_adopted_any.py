"""Any small graph, its axes, dtypes and opset anywhere: served together, each session gets what it gets alone."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from any_graph import Alone, Case, build, cases, describe
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import read_step_file
from foreign import repository
from hypothesis import given, settings
from hypothesis import strategies as st

SESSIONS, ROUNDS = 4, 6


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_together_as_alone(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = repository(Path(folder), build(case), describe(case))
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        file = read_step_file(path)
        assert file.spec.max_time_steps_per_run == 1
        assert file.spec.max_rows == (1 if case.one_row else 0)
        runner = OnnxRunner(file, Host.of("cpu", 1), 2 * SESSIONS)
    alone = [Alone(case, session) for _ in range(SESSIONS)]
    at, begun = np.arange(SESSIONS), np.zeros(SESSIONS, np.bool_)
    order = [state.name for state in file.spec.states]
    for _ in range(ROUNDS):
        members = rng.permutation(SESSIONS)[: 1 if case.one_row else rng.integers(1, SESSIONS + 1)]
        rows = rng.standard_normal((len(members), *case.x.shape)).astype(np.float32)
        sources, at[members] = at[members], (at[members] + SESSIONS) % (2 * SESSIONS)
        run = Run(sources, at[members], ~begun[members], np.ones(len(members), np.int32), [rows[:, np.newaxis]])
        result = runner.step(run)
        begun[members] = True
        states = runner.read_rows(at[members].tolist())
        for index, member in enumerate(members):
            truth = alone[member].step(rows[index])
            assert result.outputs[0][index, 0].tobytes() == truth.tobytes()
            for number, state in enumerate(case.states):
                value = states[order.index(f"state.{number}")][index]
                assert value.shape == state.at.shape
                assert value.tobytes() == state.at.out_of(alone[member].states[number]).tobytes()
        assert result.finite.all()
    runner.close()
