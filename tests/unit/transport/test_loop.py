"""Where runs go, that engines do not wait for each other, and that nothing is forgotten."""

import asyncio
import time

from conveyor_proto.v1 import session_pb2 as pb


async def test_short_runs_stay_even_of_a_size_that_was_never_run(make_server) -> None:
    server = await make_server(inline_run_s=10.0)
    stream = server.stream()
    for handle in range(40):
        await stream.attached(handle)
    # Thirty-nine at once were not measured at load, but more were.
    assert await stream.answer(0, 1, 1.0) == [11.0]
    for seq in (1, 2):
        await stream.frame(range(1, 40), [seq] * 39, [[1.0]] * 39)
        await stream.expect("frame")
    assert server.runner.rows == [1, 39, 39]
    assert server.runner.threads == ["MainThread"] * 3
    await stream.end()


async def test_long_runs_go_to_the_engine_thread(make_server) -> None:
    server = await make_server(inline_run_s=0.0)
    stream = server.stream()
    await stream.attached(1)
    for seq in (1, 2):
        await stream.answer(1, seq, 1.0)
    assert server.runner.threads == ["engine-sum-1_0"] * 2
    await stream.end()


async def test_a_model_does_not_wait_for_another(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.attached(2, model="other")
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    for seq in (1, 2, 3):
        assert await stream.answer(2, seq, 1.0) == [10.0 + seq]
    server.runner.gate.set()
    assert (await stream.expect("result")).handle == 1
    await stream.end()


async def test_long_steps_leave_room_for_short_ones(server) -> None:
    """A prompt of eight quanta does not hold up another session's single token."""
    stream = server.stream()
    await stream.attached(1)
    await stream.attached(2)
    server.runner.gate.clear()
    await stream.step(1, 1, *[1.0] * 64)
    await server.run_entered()
    await stream.step(2, 1, 1.0)
    await stream.send(detach=pb.DetachSession(handle=9))
    await stream.fault()
    server.runner.gate.set()
    assert (await stream.expect("result")).handle == 2
    assert (await stream.expect("result")).handle == 1
    await stream.end()


async def test_an_earlier_deadline_moves_the_timer(server) -> None:
    """A step's short timeout is kept although the timer was set for an idle session much later."""
    stream = server.stream()
    await stream.attached(1)
    await stream.attached(2)
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    began = server.driver.now()
    await stream.step(2, 1, 1.0, timeout_ms=30_000)
    await stream.step(2, 2, 1.0, timeout_ms=30)
    assert (await stream.fault())[:2] == (2, 2)
    assert 0.03 <= server.driver.now() - began < 5.0
    server.runner.gate.set()
    answers = [await stream.expect("result") for _ in range(2)]
    assert {(item.handle, item.seq) for item in answers} == {(1, 1), (2, 1)}
    await stream.end()


async def test_slots_are_free_when_all_sessions_are_closed(server) -> None:
    stream = server.stream()
    for handle in range(20):
        await stream.attached(handle)
    for seq in (1, 2):
        await stream.frame(range(20), [seq] * 20, [[1.0]] * 10 + [[1.0] * 30] * 10)
    rows = 0
    while rows < 40:
        rows += len((await stream.expect("frame")).handles) // 4
    for handle in range(20):
        await stream.send(close=pb.CloseAttachedSession(handle=handle))
        await stream.expect("detached")
    await stream.end()
    assert not server.directory.sessions
    server.engine.slots.check([])
    assert (server.engine.ready, server.engine.backlog.time_steps) == (0, 0)


async def test_timestamps_are_wall_clock(server) -> None:
    stream = server.stream()
    before = time.time()
    session = (await stream.attached(1)).session
    assert before - 1.0 <= session.created_at.ToNanoseconds() / 1e9 <= time.time() + 1.0
    await asyncio.wait_for(stream.end(), 20)
