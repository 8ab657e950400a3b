"""Sessions in any company, in any chunks, answer what PyTorch answers to the whole sequence."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings

from tests.congruence.conftest import FEATURES

CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sequence(seed, length):
    return np.random.default_rng(seed).standard_normal((length, FEATURES)).astype(np.float32)


@given(
    sizes=st.lists(CHUNKS, min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    eagerness=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@EXAMPLES
def test_any_interleaving_gives_the_whole_sequence_answer(model, sizes, order, eagerness, seed):
    core = model.core
    core.start_over()
    sessions = [core.open() for _ in sizes]
    inputs = [sequence([seed, index], sum(chunks)) for index, chunks in enumerate(sizes)]
    todo = []
    for index, chunks in enumerate(sizes):
        ends = np.cumsum(chunks).tolist()
        todo.append([inputs[index][end - size : end] for end, size in zip(ends, chunks, strict=True)])
    answers = {}
    # Chunks of a session keep their order; everything else is up to chance, runs between sends included.
    while any(todo):
        index = order.choice([index for index, chunks in enumerate(todo) if chunks])
        core.send(sessions[index], todo[index].pop(0))
        for _ in range(order.randint(0, eagerness)):
            core.run()
    while core.run():
        pass
    core.collect(answers)
    for session, x, chunks in zip(sessions, inputs, sizes, strict=True):
        got = np.concatenate(answers[session.id])
        assert np.abs(got - model.truth(x)).max() < 1e-5
        assert np.array_equal(got, core.alone(x, chunks)), "company changed the bits"
        if model.kind in {"lstm", "gru"}:
            assert np.array_equal(got, core.alone(x, [1] * len(x))), "chunking changed the bits"
        core.close(session)


def test_sessions_really_shared_batches(model):
    core = model.core
    sessions = [core.open() for _ in range(8)]
    core.batches.clear()
    for index, session in enumerate(sessions):
        core.send(session, sequence(index, 1 + index % 4))
    while core.run():
        pass
    core.directory.take_events()
    assert max(map(len, core.batches)) >= 4
    assert any(len(set(shares)) > 1 for shares in core.batches), "no batch was ragged"
    for session in sessions:
        core.close(session)


def test_a_fork_and_a_restored_session_go_on_bit_for_bit(model):
    core, x = model.core, sequence(3, 20)
    whole = core.alone(x, [20])
    parent = core.open()
    core.send(parent, x[:10])
    while core.run():
        pass
    core.directory.take_events()
    child = core.directory.fork(parent, 0.0)
    states = core.engine.read(parent.lane)
    restored = core.directory.restore(core.engine, states, 0.0, applied_seq=1, applied_time_steps=10)
    answers = {}
    for session in (parent, child, restored):
        core.send(session, x[10:])
    while core.run():
        pass
    core.collect(answers)
    for session in (parent, child, restored):
        assert np.array_equal(answers[session.id][0], whole[10:])
        core.close(session)
