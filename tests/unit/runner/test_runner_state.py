"""State rows: what is gathered and scattered, where it lies, and what never moves."""

import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner

KINDS = ["lstm", "gru", "rnn-tanh", "rnn-relu"]
Make = Callable[..., Any]


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_random_batches_are_bit_equal_to_numpy_gather_and_scatter(
    kind: str, layers: int, shares_memory: bool, recurrent: Make, reference: Make, load: Make
) -> None:
    capacity, rng = 40, np.random.default_rng(3)
    proto = recurrent(kind, layers=layers, initial=True)
    runner: OnnxRunner = load(proto, capacity=capacity, shares_memory=shares_memory)
    bare = reference(proto, runner.spec)
    slabs = [
        rng.standard_normal((capacity, *state.shape)).astype(np.float32) * np.float32(0.5)
        for state in runner.spec.states
    ]
    runner.write_rows(range(capacity), slabs)
    for _ in range(40):
        # From two rows on: the plain RNN operator alone gives other bits, and the runner never runs it alone.
        batch, time = int(rng.integers(2, 17)), int(rng.integers(1, 6))
        slots = rng.permutation(capacity)
        sources, destinations = slots[:batch].astype(np.int64), slots[batch : 2 * batch].astype(np.int64)
        fresh, lengths = rng.random(batch) < 0.3, rng.integers(1, time + 1, batch, dtype=np.int32)
        lengths[rng.integers(batch)] = time
        x = rng.standard_normal((batch, time, 5)).astype(np.float32)
        gathered = [
            np.where(fresh[:, np.newaxis], initial, slab[sources])
            for slab, initial in zip(slabs, bare.fresh(batch), strict=True)
        ]
        outputs, new = bare.step(gathered, [x], lengths)
        for slab, rows in zip(slabs, new, strict=True):
            slab[destinations] = rows
        result = runner.step(Run(np.where(fresh, -7, sources), destinations, fresh, lengths, [x]))
        np.testing.assert_array_equal(result.outputs[0], outputs[0], strict=True)
        assert result.finite.tolist() == [True] * batch
        for rows, slab in zip(runner.read_rows(range(capacity)), slabs, strict=True):
            np.testing.assert_array_equal(rows, slab, strict=True)


def test_a_padding_row_touches_no_slot(recurrent: Make, load: Make, one_run: Make) -> None:
    runner: OnnxRunner = load(recurrent("rnn-tanh"), capacity=3)
    marks = [np.full((3, 16), 7, np.float32)]
    runner.write_rows([0, 1, 2], marks)
    x = np.ones((1, 1, 5), np.float32)
    first = runner.step(one_run([x], [1]))
    (rows,) = runner.read_rows([0, 1, 2])
    assert (rows[[0, 2]] == 7).all()
    assert (rows[1] != 7).all()
    again = runner.step(one_run([x], [2]))
    np.testing.assert_array_equal(first.outputs[0], again.outputs[0])


def test_a_step_copies_no_slab(recurrent: Make, load: Make, one_run: Make) -> None:
    """Two GB of slab, none of it touched: a copy would commit it."""
    capacity = 1_000_000
    runner: OnnxRunner = load(recurrent("lstm", hidden=256), capacity=capacity)
    before = _resident_bytes()
    for slot in (5, capacity // 2, capacity - 1):
        runner.step(one_run([np.ones((2, 1, 5), np.float32)], [slot, slot - 1]))
    assert runner.capacity * runner.spec.state_bytes > 2_000_000_000
    assert _resident_bytes() - before < 100_000_000


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_results_are_never_overwritten(recurrent: Make, load: Make, one_run: Make) -> None:
    runner: OnnxRunner = load(recurrent("gru"))
    rng = np.random.default_rng(0)
    first = runner.step(one_run([rng.standard_normal((2, 3, 5)).astype(np.float32)], [0, 1]))
    kept, rows = first.outputs[0].copy(), runner.read_rows([0, 1])[0]
    kept_rows = rows.copy()
    runner.step(one_run([rng.standard_normal((2, 3, 5)).astype(np.float32)], [0, 1]))
    np.testing.assert_array_equal(first.outputs[0], kept)
    np.testing.assert_array_equal(rows, kept_rows)
    assert first.outputs[0].flags.c_contiguous


def test_more_shapes_than_the_buffers_may_take(
    recurrent: Make, load: Make, one_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conveyor_server.runner.onnx_runner._MAX_BUFFER_BYTES", 5_000)
    runner: OnnxRunner = load(recurrent("gru"))
    x = np.random.default_rng(0).standard_normal((9, 9, 5)).astype(np.float32)
    whole = runner.step(one_run([x], list(range(9)))).outputs[0]
    for rows in (1, 4, 9, 2):
        for time in (1, 3, 9):
            result = runner.step(one_run([np.ascontiguousarray(x[:rows, :time])], list(range(rows))))
            np.testing.assert_array_equal(result.outputs[0], whole[:rows, :time])


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
def test_rows_are_read_and_written_while_another_thread_steps(
    shares_memory: bool, recurrent: Make, load: Make, one_run: Make
) -> None:
    runner: OnnxRunner = load(recurrent("lstm", hidden=32), capacity=24, shares_memory=shares_memory)
    x = [np.random.default_rng(0).standard_normal((8, 1, 5)).astype(np.float32)]
    low, high = list(range(8)), list(range(8, 16))

    def many() -> list[np.ndarray[Any, Any]]:
        runner.step(one_run(x, low))
        for _ in range(100):
            runner.step(one_run(x, high, sources=low))
            runner.step(one_run(x, low, sources=high))
        return runner.read_rows(low)

    alone = many()
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(many)
        count = 0
        while not stepping.done() or count == 0:
            count += 1
            marks = [np.full((8, 32), count + state, np.float32) for state in range(2)]
            runner.write_rows(range(16, 24), marks)
            for rows, mark in zip(runner.read_rows(range(16, 24)), marks, strict=True):
                np.testing.assert_array_equal(rows, mark)
    for rows, expected in zip(stepping.result(), alone, strict=True):
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
def test_rows_of_every_kind_of_state(shares_memory: bool, maker: Make, load: Make, one_run: Make) -> None:
    """A convolution's context, a counter, a float16, a flag and a scalar keep their shapes, dtypes and initial rows."""
    runner: OnnxRunner = load(_assorted(maker), capacity=4, shares_memory=shares_memory)
    assert runner.read_rows([]) == [pytest.approx(np.empty((0, *s.shape))) for s in runner.spec.states]
    runner.step(one_run([np.ones((2, 3, 2), np.float32)], [2, 0], lengths=[3, 1]))
    context, count, half, flag, total = runner.read_rows([0, 2])
    np.testing.assert_array_equal(context, np.full((2, 2, 2), 4, np.float32))
    np.testing.assert_array_equal(count, np.array([[11], [13]], np.int64))
    np.testing.assert_array_equal(half, np.full((2, 3), 1.5, np.float16))
    np.testing.assert_array_equal(flag, np.array([[False], [False]]))
    np.testing.assert_array_equal(total, np.array([1.0, 1.0], np.float64))
    runner.write_rows([3, 1], [context, count + 1, half, ~flag, total])
    written = runner.read_rows([1, 3])
    assert [row.dtype for row in written] == [np.float32, np.int64, np.float16, np.bool_, np.float64]
    assert written[1].tolist() == [[14], [12]]
    assert written[3].tolist() == [[True], [True]]
    runner.write_rows([], [row[:0] for row in written])
    with pytest.raises(IndexError, match="slot 4 is not one of 0 to 3"):
        runner.read_rows([0, 4])
    with pytest.raises(IndexError, match="slot -1"):
        runner.write_rows([-1], [row[:1] for row in written])
    with pytest.raises(ValueError, match=r"float32 \[1, 2, 2\] are wanted and float64"):
        runner.write_rows([0], [written[0][:1].astype(np.float64), *(row[:1] for row in written[1:])])
    with pytest.raises(ValueError, match="4 states were given and the model has 5"):
        runner.write_rows([0], [row[:1] for row in written[1:]])


def _assorted(maker: Make) -> onnx.ModelProto:
    model = maker()
    model.input("x", [2])
    lengths = model.lengths()
    model.state("context", [2, 2], initial=np.full((2, 2), 2, np.float32))
    model.state("count", [1], dtype=np.int64, initial=np.array([10], np.int64))
    model.state("half", [3], dtype=np.float16, initial=np.full(3, 0.5, np.float16))
    model.state("flag", [1], dtype=np.bool_, initial=np.array([True]))
    model.state("total", [], dtype=np.float64)
    model.node("Mul", ["context_in", model.weight(np.float32(2))], "context_out")
    wide = model.node("Cast", [lengths], "wide", to=onnx.TensorProto.INT64)
    column = model.node("Unsqueeze", [wide, model.weight(np.array([1]))], "column")
    model.node("Add", ["count_in", column], "count_out")
    model.node("Add", ["half_in", model.weight(np.float16(1))], "half_out")
    model.node("Not", ["flag_in"], "flag_out")
    model.node("Add", ["total_in", model.weight(np.float64(1))], "total_out")
    model.node("Neg", ["x"], model.output("y", [2]))
    return model.proto()
