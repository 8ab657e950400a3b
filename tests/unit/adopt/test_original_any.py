"""The proof's own way of stepping a file is what a person would write by hand, whatever the file's axes."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from any_graph import Alone, Case, build, cases, describe
from conveyor_server.adopt.original import Original, row_of
from conveyor_server.adopt.prove import prove
from conveyor_server.runner.description import parse_description
from conveyor_server.runner.fitting import fit
from conveyor_server.runner.plain import PlainSession
from foreign import repository
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROUNDS = 4
# The fixture of this folder is the same for every example.
ONCE = [HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=ONCE)
@given(cases(), st.integers(0, 2**32 - 1))
def test_as_by_hand(case: Case, seed: int) -> None:
    rng, text = np.random.default_rng(seed), describe(case)
    with tempfile.TemporaryDirectory() as folder:
        path = repository(Path(folder), build(case), text)
        fitted = fit(build(case).proto(), parse_description(text.encode()))
        original = Original(PlainSession(path), fitted)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = 1 if case.one_row else 3
    by_hand, memories = [Alone(case, session) for _ in range(rows)], [original.fresh() for _ in range(rows)]
    for _ in range(ROUNDS):
        taken = rng.standard_normal((rows, *case.x.shape)).astype(np.float32)
        (y,) = original.step(memories, [{"x": np.asarray(row)} for row in taken], ["y"])
        for index, (one, memory) in enumerate(zip(by_hand, memories, strict=True)):
            truth = one.step(taken[index])
            row = row_of(y, case.y.batch_axis, index)
            assert row.reshape(truth.shape).tobytes() == truth.tobytes()
            for number, state in enumerate(case.states):
                assert memory.states[f"s{number}"].tobytes() == state.at.out_of(one.states[number]).tobytes()


@settings(max_examples=15, deadline=None, suppress_health_check=ONCE)
@given(cases())
def test_what_is_described_right_is_proved(case: Case) -> None:
    description = parse_description(describe(case).encode())
    with tempfile.TemporaryDirectory() as folder:
        path = repository(Path(folder), build(case), describe(case))
        proof = prove(build(case).proto(), path, PlainSession(path), description, {})
    assert proof.exact
    assert proof.time_steps == 160
