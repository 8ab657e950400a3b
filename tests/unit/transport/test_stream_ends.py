"""How streams end: cut, taken over, sent away, or read too slowly."""

import asyncio
import struct

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.transport.completion import Stream as CqStream
from conveyor_server.transport.outbox import Outbox

RESUME = pb.AttachSession.MODE_RESUME


def total_bytes(value: float) -> bytes:
    return struct.pack("<d", value)


async def test_a_cut_stream_leaves_the_session_and_its_accepted_steps(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await stream.step(1, 2, 2.0)
    await server.run_entered()
    stream.call.cancel()
    await server.no_streams()
    server.runner.gate.set()
    again = server.stream()
    attached = await again.attached(1, "a", mode=RESUME)
    assert attached.session.epoch == 2
    # Sent again: each is answered once, from the record or when it is done, and applied once.
    await again.step(1, 1, 1.0)
    await again.step(1, 2, 2.0)
    for seq, total in ((1, 11.0), (2, 13.0)):
        result = await again.expect("result")
        assert (result.seq, result.outputs[1].data) == (seq, total_bytes(total))
    assert await again.answer(1, 3, 1.0) == [14.0]
    await again.end()


@pytest.mark.parametrize("form", ["frame", "steps"])
async def test_a_cut_stream_leaves_what_went_off_together(server, form) -> None:
    """Steps that were accepted as arrays are asked about singly once another stream holds their sessions."""
    stream = server.stream()
    for handle in range(8):
        await stream.attached(handle, f"s{handle}")
    server.runner.gate.clear()
    if form == "frame":
        await stream.frame(range(8), [1] * 8, [[1.0]] * 8)
    else:
        for handle in range(8):
            await stream.step(handle, 1, 1.0)
    await server.run_entered()
    backlog = server.driver.repository.find("sum", "").serving.backlog
    while backlog.steps < 8:  # noqa: ASYNC110 - the run began with what was there, and nothing tells of the rest
        await asyncio.sleep(0.002)
    stream.call.cancel()
    await server.no_streams()
    again = server.stream()
    for handle in range(8):
        attached = await again.attached(handle, f"s{handle}", mode=RESUME)
        assert (attached.session.epoch, attached.session.pending_steps) == (2, 1)
    server.runner.gate.set()
    for handle in range(8):
        assert await again.answer(handle, 1, 1.0) == [11.0]
        assert await again.answer(handle, 2, 1.0) == [12.0]
    await again.end()


async def test_a_connection_that_dies_leaves_the_session(server) -> None:
    channel = server.connect()
    stream = server.stream(channel)
    await stream.attached(1, "a")
    await stream.answer(1, 1, 1.0)
    await channel.close()
    await server.no_streams()
    assert server.directory.sessions["a"].attachment is None
    again = server.stream()
    assert (await again.attached(1, "a", mode=RESUME)).session.applied_seq == 1
    await again.end()


async def test_a_resume_fences_the_older_stream(server) -> None:
    old, new = server.stream(), server.stream()
    await old.attached(1, "a")
    await old.answer(1, 1, 1.0)
    attached = await new.attached(5, "a", mode=RESUME)
    assert attached.session.epoch == 2
    detached = await old.expect("detached")
    assert (detached.handle, detached.cause, detached.session_id) == (1, pb.DETACH_CAUSE_TAKEN_OVER, "a")
    await old.step(1, 2, 1.0)
    assert (await old.fault())[2].reason == e.ERROR_REASON_HANDLE_UNKNOWN
    assert await new.answer(5, 2, 1.0) == [12.0]
    await old.end()
    await new.end()


async def test_a_take_over_aborts_what_waits_and_keeps_what_runs(server) -> None:
    old, new = server.stream(), server.stream()
    await old.attached(1, "a")
    server.runner.gate.clear()
    await old.step(1, 1, 1.0)
    await server.run_entered()
    await old.step(1, 2, 2.0)
    await old.send(detach=pb.DetachSession(handle=99))
    await old.fault()
    await new.attached(5, "a", mode=RESUME)
    _, seq, fault = await old.fault()
    assert (seq, fault.reason, fault.metadata["epoch"]) == (2, e.ERROR_REASON_SESSION_TAKEN_OVER, "2")
    assert (await old.expect("detached")).cause == pb.DETACH_CAUSE_TAKEN_OVER
    await new.step(5, 1, 1.0)
    await new.step(5, 2, 5.0)
    server.runner.gate.set()
    assert [(await new.expect("result")).seq for _ in range(2)] == [1, 2]
    assert server.directory.sessions["a"].applied_seq == 2
    await old.end()
    await new.end()


async def test_a_client_that_was_cut_off_does_not_take_back(server) -> None:
    old, new = server.stream(), server.stream()
    await old.attached(1, "a")
    await new.attached(1, "a", mode=RESUME)
    await old.expect("detached")
    await old.attach(2, "a", mode=RESUME, max_epoch=1)
    fault = (await old.fault())[2]
    assert (fault.reason, fault.metadata) == (
        e.ERROR_REASON_SESSION_TAKEN_OVER,
        {"session_id": "a", "epoch": "2"},
    )
    assert await new.answer(1, 1, 1.0) == [11.0]
    await old.end()
    await new.end()


async def test_resuming_under_another_handle_of_the_same_stream(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    await stream.attach(2, "a", mode=RESUME)
    detached = await stream.expect("detached")
    assert (detached.handle, detached.cause) == (1, pb.DETACH_CAUSE_TAKEN_OVER)
    assert (await stream.expect("attached")).handle == 2
    assert await stream.answer(2, 1, 1.0) == [11.0]
    await stream.end()


async def test_drain_answers_what_was_accepted_and_ends_streams(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    await stream.attached(2, "idle")
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    server.directory.draining = True
    now = server.driver.now()
    drain = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    assert 0 < (await stream.expect("go_away")).grace.ToSeconds() <= 20
    assert (await stream.expect("detached")).handle == 2
    await stream.step(1, 2, 1.0)
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason) == (2, e.ERROR_REASON_DRAINING)
    assert fault.retry_s is not None
    await stream.attach(3)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_DRAINING
    server.runner.gate.set()
    assert (await stream.expect("result")).seq == 1
    assert (await stream.expect("detached")).applied_seq == 1
    await stream.expect("end")
    await stream.ended()
    assert await drain is True


async def test_a_stream_opened_while_draining_is_sent_away(server) -> None:
    server.directory.draining = True
    now = server.driver.now()
    assert await server.grpc.drain(now + 5.0, now)
    stream = server.stream()
    await stream.expect("go_away")
    await stream.expect("end")
    await stream.ended()


async def test_a_drain_ends_in_time(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    now = server.driver.now()
    assert await server.grpc.drain(now + 0.05, now) is False
    await stream.expect("go_away")


async def test_a_slow_reader_is_not_read_from_and_blocks_nobody(make_server, wire_options, monkeypatch) -> None:
    limit, steps, time_steps = 100_000, 200, 4000
    full, peaks = asyncio.Event(), [0]

    def watch(outlet: type, unsent: str) -> None:
        put = outlet.put

        def watched(self: object, message: bytes) -> None:
            put(self, message)
            peaks.append(getattr(self, unsent))
            if peaks[-1] > limit:
                full.set()

        monkeypatch.setattr(outlet, "put", watched)

    watch(Outbox, "bytes")
    watch(CqStream, "unsent_bytes")
    server = await make_server(
        wire=wire_options(max_outgoing_bytes=limit), max_time_steps=4096, quantum=4096, inline_run_s=1.0
    )
    slow, quick = server.stream(server.connect()), server.stream()
    await slow.attached(1, "slow", options=pb.SessionOptions(max_in_flight=steps))
    await quick.attached(1)
    # From now on the driver knows that runs of this size are short, and none is read ahead of.
    assert await quick.answer(1, 1, *[0.0] * time_steps) == [10.0] * time_steps
    flood = asyncio.create_task(send_many(slow, steps, [0.0] * time_steps))
    # Wire and flow-control windows take some; then answers wait here, and no further request is read.
    await asyncio.wait_for(full.wait(), 20)
    for count in range(1, 51):
        assert await quick.answer(1, 1 + count, 1.0) == [10.0 + count]
    assert server.directory.sessions["slow"].accepted_seq < steps
    for seq in range(1, steps + 1):
        assert (await slow.expect("result")).seq == seq
    await flood
    # Beyond the limit there is what had been read when it was reached: a few requests, and never the flood.
    assert limit < max(peaks) <= limit + steps // 10 * (time_steps * 8 + 100)
    await slow.end()
    await quick.end()


async def send_many(stream, count: int, values: list[float]) -> None:
    for seq in range(1, count + 1):
        await stream.step(1, seq, *values)


@pytest.mark.parametrize("streams", [20])
async def test_many_streams_with_cuts_apply_every_step_once(server, streams) -> None:
    async def client(name: str) -> None:
        stream = server.stream()
        await stream.attached(1, name)
        seq = 0
        while seq < 30:
            await stream.step(1, seq + 1, 1.0)
            if seq % 7 == 3:
                stream.call.cancel()
                stream = server.stream()
                seq = (await stream.attached(1, name, mode=RESUME)).session.applied_seq
                if seq % 7 == 4:
                    # Applied although the answer was lost: the answer is still there.
                    await stream.step(1, seq, 1.0)
                    assert (await stream.expect("result")).seq == seq
                continue
            result = await stream.expect("result")
            assert result.seq == seq + 1
            seq += 1
            assert result.outputs[1].data == total_bytes(10.0 + seq)
        await stream.end()

    await asyncio.gather(*(client(f"s{index}") for index in range(streams)))
    assert all(session.applied_seq == 30 for session in server.directory.sessions.values())


async def test_steps_on_their_way_when_the_server_stops_are_refused_and_not_cut_off(make_server) -> None:
    server = await make_server()
    stream = server.stream()
    await stream.attached(1)
    assert await stream.answer(1, 1, 1.0) == [11.0]
    now = server.driver.now()
    server.directory.draining = True
    draining = asyncio.create_task(server.grpc.drain(now + 20, now))
    await stream.expect("go_away")
    await stream.expect("detached")
    for seq in (2, 3):
        await stream.step(1, seq, 1.0)
        handle, got, fault = await stream.fault()
        assert (handle, got, fault.reason) == (1, seq, e.ERROR_REASON_DRAINING)
    # The half-close, and no timer, ends it.
    await stream.end()
    assert await asyncio.wait_for(draining, 0.9)
