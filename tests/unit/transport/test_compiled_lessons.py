"""What the compiled part learns of messages and models, what it lets go, and whom it does not let wait."""

import gc
import weakref

import numpy as np
import pytest
from conveyor_server import compiled

from tests.unit.transport.test_compiled_turns import Twin
from tests.unit.transport.test_intake import step


@pytest.fixture
async def turns(make_server):
    """A server with two streams of model sum and one of the other, which has seen a step of each model."""
    server = await make_server(inline_run_s=10.0)
    twin = Twin(server)
    for number, model in enumerate(("sum", "sum", "other")):
        twin.open(range(number, number + 1), model)
    await twin.settle()
    for number in (0, 1, 2, 0, 1, 2):
        twin.streams[number][0].receive(step(number, 1 + len(twin.told[number]), 1.0))
        await twin.settle()
    return twin


async def test_messages_with_too_long_a_head_go_by_arrays(make_server, monkeypatch) -> None:
    """Names of inputs are in it, of any length."""
    monkeypatch.setattr(compiled, "MOST_HEAD_BYTES", 4)
    server = await make_server(inline_run_s=10.0)
    twin = Twin(server)
    twin.open(range(1), "sum")
    for seq in range(1, 4):
        twin.streams[0][0].receive(step(0, seq, 1.0))
        await twin.settle()
        twin.streams[0][0].receive(step(0, seq + 3, 1.0))
        await twin.settle()
    assert [told[0] for told in twin.told[0] if told[1] != "STEP_GAP"] == [1, 2, 3]
    assert server.grpc._streams._intake._turns._numbers == {}


async def test_messages_that_teach_nothing_keep_no_others_of_their_size_from_it(make_server, monkeypatch) -> None:
    server = await make_server(inline_run_s=10.0)
    twin = Twin(server)
    twin.open(range(1, 3), "sum")
    await twin.settle()
    went = []
    run_turn = server.directory.run_turn

    def noted(turn, now):
        went.append(turn.rows)
        return run_turn(turn, now)

    monkeypatch.setattr(server.directory, "run_turn", noted)
    looked = []
    learn_form = server.grpc._streams._intake._turns._learn_form
    monkeypatch.setattr(
        server.grpc._streams._intake._turns, "_learn_form", lambda *of: looked.append(of) or learn_form(*of)
    )
    for seq in range(1, 101):
        # As protobuf may be written too: the numbers behind the data.
        usual = step(1, seq, 1.0)
        odd = usual[:2] + usual[6:] + usual[2:6]
        twin.streams[0][0].receive(odd)
        await twin.settle()
    assert twin.told[1][-1][:2] == (100, [np.float64(110.0).tobytes()] * 2)
    assert len(looked) == 64 + 1
    for seq in range(1, 101):
        twin.streams[0][0].receive(step(2, seq, 1.0))
        await twin.settle()
    assert len(odd) == len(step(2, 100, 1.0))
    assert twin.told[2][-1][:2] == (100, [np.float64(110.0).tobytes()] * 2)
    assert len(went) > 50


async def test_an_odd_message_of_another_model_leaves_the_turn_to_the_others(turns, monkeypatch) -> None:
    went = []
    run_turn = turns.server.directory.run_turn

    def noted(turn, now):
        went.append(turn.rows)
        return run_turn(turn, now)

    monkeypatch.setattr(turns.server.directory, "run_turn", noted)
    turns.streams[2][0].receive(step(2, 99, 1.0))
    for number in (0, 1):
        turns.streams[number][0].receive(step(number, 3, 1.0))
    await turns.settle()
    assert went == [2]
    assert turns.told[2][-1] == (99, "STEP_GAP")
    assert [turns.told[number][-1][0] for number in (0, 1)] == [3, 3]


async def test_what_was_read_is_not_kept_beyond_its_turn(turns) -> None:
    turns.streams[0][0].receive(step(0, 3, 1.0))
    await turns.settle()
    call, paper = turns.streams.pop(0)
    gone = weakref.ref(paper)
    call.broken()
    turns.server.grpc._streams.leave(call)
    del call, paper
    gc.collect()
    assert gone() is None


async def test_a_model_that_is_gone_is_kept_by_nothing(make_server) -> None:
    """Its state, its records and its weights would be."""
    server = await make_server(inline_run_s=10.0)
    twin = Twin(server)
    twin.open(range(1), "sum")
    await twin.settle()
    for seq in range(1, 4):
        twin.streams[0][0].receive(step(0, seq, 1.0))
        await twin.settle()
    assert [seq for seq, _, _ in twin.told[0]] == [1, 2, 3]
    turns = server.grpc._streams._intake._turns
    assert len(turns._numbers) == 1
    gone = weakref.ref(server.engine)
    assert await server.loader.unload("sum", "1", force=True) == 1
    await twin.settle()
    assert twin.others[-1] == "detached"
    assert turns._numbers == {}
    gc.collect()
    assert gone() is None
