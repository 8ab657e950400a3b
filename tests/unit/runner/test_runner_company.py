"""A row's answers do not depend on who shares its batch, nor on how its time is cut: bit for bit on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner

KINDS = ["lstm", "gru", "rnn-tanh", "rnn-relu"]
Make = Callable[..., Any]
SIZE, TIME, SESSIONS = 5, 12, 6


def _alone(runner: OnnxRunner, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """Each session alone, its whole time at once."""
    answers = []
    for session in range(len(x)):
        run = Run(
            np.zeros(1, np.int64),
            np.array([session]),
            np.ones(1, np.bool_),
            np.array([x.shape[1]], np.int32),
            [x[session : session + 1]],
        )
        answers.append(runner.step(run).outputs[0][0])
    return np.stack(answers), runner.read_rows(range(len(x)))


def _in_company(
    runner: OnnxRunner, x: np.ndarray[Any, Any], rng: np.random.Generator
) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """Random sessions in each batch, each with a chunk of random length, in random slots of the slab."""
    answers = [[] for _ in x]
    slot: dict[int, int] = {}
    done = [0] * len(x)
    while unfinished := [session for session in range(len(x)) if done[session] < x.shape[1]]:
        batch = rng.permutation(unfinished)[: rng.integers(1, len(unfinished) + 1)].tolist()
        lengths = [int(rng.integers(1, min(5, x.shape[1] - done[session]) + 1)) for session in batch]
        chunk = rng.standard_normal((len(batch), max(lengths), x.shape[2])).astype(np.float32)
        for row, (session, length) in enumerate(zip(batch, lengths, strict=True)):
            chunk[row, :length] = x[session, done[session] : done[session] + length]
        free = rng.permutation([item for item in range(runner.capacity) if item not in slot.values()])
        destinations = free[: len(batch)].astype(np.int64)
        run = Run(
            sources=np.array([slot.get(session, 0) for session in batch], np.int64),
            destinations=destinations,
            fresh=np.array([session not in slot for session in batch]),
            lengths=np.array(lengths, np.int32),
            inputs=[chunk],
        )
        result = runner.step(run)
        for row, (session, length) in enumerate(zip(batch, lengths, strict=True)):
            answers[session].append(result.outputs[0][row, :length])
            done[session] += length
            slot[session] = int(destinations[row])
    return np.stack([np.concatenate(parts) for parts in answers]), runner.read_rows([slot[s] for s in range(len(x))])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("layers", "hidden", "outputs"), [(1, 16, 3), (2, 37, 1), (1, 256, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_in_company_are_the_same_bits(
    kind: str, layers: int, hidden: int, outputs: int, head: str, threads: int, recurrent: Make, load: Make
) -> None:
    proto = recurrent(kind, layers=layers, size=SIZE, hidden=hidden, outputs=outputs, head=head, initial=True)
    runner: OnnxRunner = load(proto, capacity=3 * SESSIONS, threads=threads)
    rng = np.random.default_rng(hidden)
    x = rng.standard_normal((SESSIONS, TIME, SIZE)).astype(np.float32)
    outputs_alone, states_alone = _alone(runner, x)
    for _ in range(3):
        answers, states = _in_company(runner, x, rng)
        np.testing.assert_array_equal(answers, outputs_alone)
        for found, alone in zip(states, states_alone, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_the_plain_rnn_operator_alone_needs_the_second_row(recurrent: Make, reference: Make, load: Make) -> None:
    """What the padding is for: without it the operator gives other bits for one row than for two."""
    proto = recurrent("rnn-tanh", hidden=37)
    runner: OnnxRunner = load(proto)
    bare, x = reference(proto, runner.spec), np.random.default_rng(1).standard_normal((8, 12, 5)).astype(np.float32)
    full = np.full(8, 12, np.int32)
    (together,), _ = bare.step(bare.fresh(8), [x], full)
    alone = np.concatenate([bare.step(bare.fresh(1), [x[i : i + 1]], full[:1])[0][0] for i in range(8)])
    assert not np.array_equal(alone, together)
    answers, _ = _alone(runner, x)
    np.testing.assert_array_equal(answers, together)


@pytest.mark.parametrize("shares_memory", [True, False], ids=["host", "as-a-device"])
def test_a_convolution_gives_one_time_step_the_same_bits_as_a_chunk(
    shares_memory: bool, maker: Make, load: Make
) -> None:
    proto = _causal_convolution(maker, 16, 7)
    runner: OnnxRunner = load(proto, capacity=3 * SESSIONS, shares_memory=shares_memory)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((SESSIONS, TIME, 16)).astype(np.float32)
    answers_alone, states_alone = _alone(runner, x)
    for _ in range(5):
        answers, states = _in_company(runner, x, rng)
        np.testing.assert_array_equal(answers, answers_alone)
        np.testing.assert_array_equal(states[0], states_alone[0])


def _causal_convolution(maker: Make, size: int, outputs: int) -> onnx.ModelProto:
    """Three time steps wide; the two before the chunk are state `[2, size]`, taken at each row's own length."""
    model = maker()
    joined = model.node("Concat", [model.state("context", [2, size]), model.input("x", [size])], "joined", axis=1)
    columns = model.node("Transpose", [joined], "columns", perm=[0, 2, 1])
    kernel, bias = model.weight(model.random(outputs, size, 3)), model.weight(model.random(outputs))
    convolved = model.node("Conv", [columns, kernel, bias], "convolved")
    model.node("Transpose", [convolved], model.output("y", [outputs]), perm=[0, 2, 1])
    lengths = model.node("Cast", [model.lengths()], "lengths.wide", to=onnx.TensorProto.INT64)
    starts = model.node("Unsqueeze", [lengths, model.weight(np.array([1]))], "starts")
    places = model.node("Add", [starts, model.weight(np.array([[0, 1]]))], "places")
    model.node("Unsqueeze", [places, model.weight(np.array([2]))], "index")
    model.node("GatherND", ["joined", "index"], "context_out", batch_dims=1)
    return model.proto()
