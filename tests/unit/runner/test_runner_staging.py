"""Buffers that are filled in place: the same run as `step`, and nothing that outlives its runner."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner

Make = Callable[..., Any]


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh", "rnn-relu"])
def test_what_is_filled_in_place_runs_as_a_step_does(
    kind: str, shares_memory: bool, recurrent: Make, load: Make
) -> None:
    rng = np.random.default_rng(5)
    proto = recurrent(kind, initial=True)
    stepped: OnnxRunner = load(proto, capacity=16, shares_memory=shares_memory)
    staged: OnnxRunner = load(proto, capacity=16, shares_memory=shares_memory)
    inputs = stepped.spec.inputs
    rows_of_state = [rng.standard_normal((16, *state.shape)).astype(np.float32) for state in stepped.spec.states]
    for runner in (stepped, staged):
        runner.write_rows(range(16), rows_of_state)
    for turn in range(6):
        rows = 1 + turn % 4
        first = 8 * (turn % 2)
        run = Run(
            np.arange(8 - first, 8 - first + rows),
            np.arange(first, first + rows),
            np.full(rows, turn == 0),
            np.ones(rows, np.int32),
            [rng.standard_normal((rows, 1, *item.shape)).astype(np.float32) for item in inputs],
        )
        wanted = stepped.step(run)
        staging = staged.staging(rows)
        assert staging is not None
        assert staged.staging(rows) is staging
        staging.frame.put(run)
        staged.run_staged(staging)
        found = staging.frame.take()
        for mine, theirs in zip(found.outputs, wanted.outputs, strict=True):
            assert np.array_equal(mine, theirs)
    for mine, theirs in zip(staged.read_rows(range(16)), stepped.read_rows(range(16)), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_runner_that_is_closed_frees_its_buffers_at_once(recurrent: Make, load: Make) -> None:
    """Not when the garbage collector comes round, which in a server is next to never: they hold the slab."""
    runner: OnnxRunner = load(recurrent("lstm"), capacity=8)
    staging = runner.staging(3)
    assert staging is not None
    frame, runs = weakref.ref(staging.frame), staging.rows
    assert runs == 3
    del staging
    gc.collect()
    gc.disable()
    try:
        runner.close()
        assert frame() is None
    finally:
        gc.enable()
    # Whoever opened it would close it again.
    runner.close = lambda: None
