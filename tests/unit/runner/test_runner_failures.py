"""A run that fails fails alone: nothing else moves, the runner goes on, and no message holds what was sent."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_server.runner.base import Run, RunFailed
from conveyor_server.runner.onnx_runner import OnnxRunner

Make = Callable[..., Any]


def _embedding(maker: Make) -> onnx.ModelProto:
    """Tokens -> embedding -> GRU -> one vector per chunk: an output without time."""
    model = maker()
    tokens = model.input("tokens", [], dtype=np.int64)
    embedded = model.node("Gather", [model.weight(model.random(11, 8)), tokens], "embedded")
    model.recurrent("GRU", embedded, 8, 16, prefix="gru")
    model.node("Mul", ["gru.hidden_out", model.weight(np.float32(2))], model.output("last", [16], has_time=False))
    return model.proto()


def test_integer_inputs_and_an_output_without_time(maker: Make, reference: Make, load: Make, one_run: Make) -> None:
    proto = _embedding(maker)
    runner: OnnxRunner = load(proto)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 4))
    result = runner.step(one_run([tokens], [0, 1, 2], lengths=[4, 2, 3]))
    bare = reference(proto, runner.spec)
    (expected,), _ = bare.step(bare.fresh(3), [tokens], np.array([4, 2, 3], np.int32))
    np.testing.assert_array_equal(result.outputs[0], expected, strict=True)
    assert expected.shape == (3, 16)


def test_a_model_that_raises(
    maker: Make, load: Make, one_run: Make, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner: OnnxRunner = load(_embedding(maker), capacity=8)
    good, bad = np.array([[1, 2]]), np.array([[3, 4], [5, 424242]])
    runner.step(one_run([good], [0]))
    before = runner.read_rows([0, 1, 2, 3])
    with pytest.raises(RunFailed, match="onnxruntime failed on 2 rows of up to 2 time steps") as failure:
        runner.step(one_run([bad], [4, 5]))
    assert "424242" not in str(failure.value)
    assert capfd.readouterr() == ("", ""), "onnxruntime spoke for itself"
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    for rows, kept in zip(runner.read_rows([0, 1, 2, 3]), before, strict=True):
        np.testing.assert_array_equal(rows, kept)
    again = runner.step(one_run([good], [6]))
    np.testing.assert_array_equal(again.outputs[0][0], 2 * runner.read_rows([0])[0][0])


def test_an_empty_batch_never_reaches_onnxruntime(recurrent: Make, load: Make, one_run: Make) -> None:
    runner: OnnxRunner = load(recurrent("lstm"))
    for shape in [(0, 1, 5), (0, 0, 5), (2, 0, 5)]:
        with pytest.raises(RunFailed, match="empty batch"):
            runner.step(one_run([np.zeros(shape, np.float32)], list(range(shape[0]))))


@pytest.mark.parametrize(
    "change",
    [
        lambda run: {"inputs": [run.inputs[0].astype(np.float64)]},
        lambda run: {"inputs": [run.inputs[0][:, :, :4]]},
        lambda run: {"inputs": []},
        lambda run: {"inputs": [run.inputs[0], run.inputs[0]]},
        lambda run: {"lengths": run.lengths[:1]},
        lambda run: {"lengths": run.lengths.astype(np.int64)},
        lambda run: {"sources": run.sources[:1]},
        lambda run: {"destinations": run.destinations[:, np.newaxis]},
        lambda run: {"fresh": run.fresh.astype(np.int8)},
    ],
)
def test_a_batch_of_other_shapes_or_dtypes(
    change: Callable[[Run], dict[str, Any]], recurrent: Make, load: Make, one_run: Make
) -> None:
    runner: OnnxRunner = load(recurrent("gru"))
    run = one_run([np.full((2, 3, 5), 0.25, np.float32)], [0, 1])
    fields = {name: getattr(run, name) for name in ("sources", "destinations", "fresh", "lengths", "inputs")}
    with pytest.raises(RunFailed) as failure:
        runner.step(Run(**(fields | change(run))))
    assert "0.25" not in str(failure.value)
    runner.step(run)


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh", "rnn-relu"])
def test_a_row_whose_state_is_not_finite_is_named_alone(
    kind: str, value: float, shares_memory: bool, recurrent: Make, load: Make, one_run: Make
) -> None:
    runner: OnnxRunner = load(recurrent(kind, layers=2), shares_memory=shares_memory)
    x = np.random.default_rng(0).standard_normal((5, 1, 5)).astype(np.float32)
    clean = runner.step(one_run([x], [10, 11, 12, 13, 14]))
    rows = runner.read_rows([10, 11, 12, 13, 14])
    for state in range(len(rows)):
        for place in (0, 7, 15):
            poisoned = [item.copy() for item in rows]
            poisoned[state][3, place] = value
            runner.write_rows([20, 21, 22, 23, 24], poisoned)
            result = runner.step(one_run([x], [30, 31, 32, 33, 34], sources=[20, 21, 22, 23, 24]))
            after = runner.read_rows([30, 31, 32, 33, 34])
            finite = np.all([np.isfinite(item).all(axis=1) for item in after], axis=0)
            np.testing.assert_array_equal(result.finite, finite)
            assert finite[[0, 1, 2, 4]].all()
            assert np.isfinite(result.outputs[0][[0, 1, 2, 4]]).all()
    assert clean.finite.all()


def test_a_finite_state_may_be_large(maker: Make, load: Make, one_run: Make) -> None:
    model = maker()
    model.state("sum", [64])
    total = model.node("ReduceSum", [model.input("x", [64]), model.weight(np.array([1]))], "total", keepdims=0)
    model.node("Add", ["sum_in", total], "sum_out")
    model.lengths()
    model.node("Neg", ["x"], model.output("y", [64]))
    runner: OnnxRunner = load(model.proto())
    x = np.full((3, 1, 64), 3e38, np.float32)
    x[1, 0, 63] = np.inf
    x[2, 0, :32] *= -1
    assert runner.step(one_run([x], [0, 1, 2])).finite.tolist() == [True, False, True]
    again = runner.step(one_run([x], [3, 4, 5], sources=[0, 1, 2]))
    assert again.finite.tolist() == [False, False, False]


def test_a_stateless_model(maker: Make, load: Make, one_run: Make) -> None:
    model = maker()
    model.node("Neg", [model.input("x", [2])], model.output("y", [2]))
    runner: OnnxRunner = load(model.proto())
    result = runner.step(one_run([np.ones((3, 2, 2), np.float32)], [0, 1, 2]))
    assert (result.outputs[0] == -1).all()
    assert result.finite.tolist() == [True, True, True]
    assert runner.read_rows([0, 1]) == []
