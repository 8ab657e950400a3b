"""The completion queue: what it survives, and that it is prompt."""

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.transport import selftest
from conveyor_server.transport.grpc_cq import CqServer
from conveyor_server.transport.selftest import Mirror, Unusable
from conveyor_server.transport.stream import StreamCall
from grpc import _server

from tests.unit.transport.conftest import until

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])


# ---------------------------------------------------------------- the self-test


@on_the_queue
@pytest.mark.parametrize(
    ("receive", "told"),
    [
        (lambda mirror, data: mirror._outlet.put(data + b"!"), "came back changed"),
        (lambda mirror, data: None, "did not come back: _MultiThreadedRendezvous"),
        (lambda mirror, data: mirror._outlet.close(), "did not come back: StopIteration"),
    ],
    ids=["changed", "lost", "ended"],
)
async def test_a_queue_that_does_not_do_what_it_should_is_unusable(make_server, monkeypatch, receive, told):
    monkeypatch.setattr(selftest, "_SELFTEST_S", 0.2)
    monkeypatch.setattr(Mirror, "receive", receive)
    stopped = []

    async def start(self) -> None:
        try:
            await begin(self)
        except Unusable:
            # As the app does, whatever kept it from starting.
            await self.stop()
            stopped.append(True)
            raise

    begin = CqServer.start
    monkeypatch.setattr(CqServer, "start", start)
    with pytest.raises(Unusable, match=told):
        await make_server()
    assert stopped == [True]


@on_the_queue
async def test_nobody_else_reaches_the_method_of_the_self_test(server) -> None:
    for name in ("Alarm", "", "0" * 32):
        call = server.channel.stream_stream(f"/conveyor.internal.Loop/{name}")()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


# ---------------------------------------------------------------- defects


async def ended_with_incident(stream, caplog) -> None:
    assert await asyncio.wait_for(stream.call.code(), 20) is grpc.StatusCode.INTERNAL
    details = await stream.call.details()
    assert "secret" not in details
    incident = details.partition("incident ")[2].partition(" ")[0]
    assert any(incident in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.parametrize("at", ["request", "_detach", "half_close", "__init__"])
async def test_a_defect_in_one_stream_ends_that_stream_only(server, monkeypatch, caplog, at) -> None:
    neighbour = server.stream()
    await neighbour.attached(1)
    original = getattr(StreamCall, at)

    def broken(call: StreamCall, *args: object) -> object:
        if at == "__init__" or call.number != keep:
            raise KeyError("secret")
        return original(call, *args)

    keep = server.directory.sessions[next(iter(server.directory.sessions))].attachment.number
    stream = server.stream()
    if at != "__init__":
        # Set up for certain.
        await stream.send(detach=pb.DetachSession(handle=9))
        await stream.fault()
    monkeypatch.setattr(StreamCall, at, broken)
    if at == "__init__":
        stream = server.stream()
    if at == "request":
        await stream.attach(1)
    elif at == "_detach":
        await stream.send(detach=pb.DetachSession(handle=1))
    else:
        await stream.call.done_writing()
    await ended_with_incident(stream, caplog)
    monkeypatch.setattr(StreamCall, at, original)
    assert await neighbour.answer(1, 1, 1.0) == [11.0]
    assert not server.driver.failed.done()
    await neighbour.end()
    await server.no_streams()


@on_the_queue
async def test_a_defect_at_the_very_end_of_a_stream_keeps_nothing_from_stopping(server, monkeypatch, caplog) -> None:
    neighbour, stream = server.stream(), server.stream()
    await neighbour.attached(1)
    await stream.attached(1)
    original, ended = StreamCall.broken, asyncio.Event()

    def broken(call: StreamCall) -> None:
        ended.set()
        raise KeyError("secret")

    monkeypatch.setattr(StreamCall, "broken", broken)
    stream.call.cancel()
    await asyncio.wait_for(ended.wait(), 20)
    monkeypatch.setattr(StreamCall, "broken", original)
    assert await neighbour.answer(1, 1, 1.0) == [11.0]
    await neighbour.end()
    assert "what follows the end of a call failed" in caplog.text
    # The fixture stops the server, which waits until every call is let go.


@on_the_queue
async def test_a_defect_in_an_event_keeps_the_others_going(server, monkeypatch, caplog) -> None:
    stream = server.stream()
    await stream.attached(1)
    monkeypatch.setattr(_server, "_handle_call", lambda *_: 1 / 0)
    lost = server.stream()
    await until(lambda: "an event of the completion queue failed" in caplog.text)
    monkeypatch.undo()
    assert await stream.answer(1, 1, 1.0) == [11.0]
    # And the place of the accept that failed was filled again.
    other = server.stream()
    await other.attached(2)
    lost.call.cancel()
    await other.end()
    await stream.end()


# ---------------------------------------------------------------- streams that come and go


async def test_streams_that_are_cancelled_while_they_are_set_up(server) -> None:
    stay = server.stream()
    await stay.attached(1, "stays")
    for turn in range(20):
        streams = [server.stream() for _ in range(10)]
        for index, stream in enumerate(streams):
            if index % 2:
                await stream.attach(1, f"s{turn}-{index}")
            if index % 3 == 0:
                # Far enough for the server to have seen something of it, or nothing.
                await asyncio.sleep(0)
            stream.call.cancel()
    assert await stay.answer(1, 1, 1.0) == [11.0]
    await stay.end()
    await server.no_streams()
    assert not any(session.attachment for session in server.directory.sessions.values())


async def test_all_of_many_streams_that_are_opened_at_once_are_served(make_server) -> None:
    streams = 2000
    server = await make_server(max_sessions=streams, inline_run_s=10.0)
    channels = [server.connect() for _ in range(8)]

    async def client(number: int) -> None:
        stream = server.stream(channels[number % len(channels)])
        await stream.attached(1)
        assert await stream.answer(1, 1, 1.0) == [11.0]
        answered.append(number)
        await all_answered.wait()
        await stream.end()

    answered: list[int] = []
    all_answered = asyncio.Event()
    clients = [asyncio.create_task(client(number)) for number in range(streams)]
    await until(lambda: len(answered) == streams or any(task.done() for task in clients))
    assert server.metrics.streams == streams
    all_answered.set()
    await asyncio.gather(*clients)
    for channel in channels:
        await channel.close()


async def test_a_silent_stream_is_told_at_once(server) -> None:
    """Take-over and GoAway are answers to nothing that the stream itself has said."""
    silent, other = server.stream(), server.stream()
    await silent.attached(1, "a")
    told: list[tuple[str, float]] = []

    async def listen() -> None:
        while len(told) < 3:
            told.append(((await silent.receive()).WhichOneof("kind"), time.monotonic()))

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await other.attached(1, "a", mode=pb.AttachSession.MODE_RESUME)
    await until(lambda: told)
    now = server.driver.now()
    drained = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    await until(lambda: len(told) == 2)
    await silent.call.done_writing()
    await listening
    assert [kind for kind, _ in told] == ["detached", "go_away", "end"]
    # No look of every 50 ms, nor any other timer, stands between.
    assert told[0][1] - began < 0.04
    await other.call.done_writing()
    assert await drained


async def test_a_server_that_stops_ends_its_streams_at_once(make_server) -> None:
    server = await make_server()
    streams = [server.stream() for _ in range(50)]
    for handle, stream in enumerate(streams):
        await stream.attached(handle)
    began = time.monotonic()
    await server.grpc.stop()
    assert time.monotonic() - began < 1.0
    for stream in streams:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.receive()
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    await server.no_streams()
    assert not any(session.attachment for session in server.directory.sessions.values())


async def test_a_server_that_drains_waits_for_nothing_once_all_is_answered(server) -> None:
    streams = [server.stream() for _ in range(50)]
    for handle, stream in enumerate(streams):
        await stream.attached(handle)
        await stream.step(handle, 1, 1.0)
    now = server.driver.now()
    drained = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    for stream in streams:
        kinds = {(await stream.receive()).WhichOneof("kind") for _ in range(3)}
        # A step that came only after the server had said so is refused.
        assert kinds in ({"detached", "go_away", "result"}, {"detached", "go_away", "error"})
        await stream.call.done_writing()
        await stream.expect("end")
        await stream.ended()
    assert await asyncio.wait_for(drained, 0.5)


def test_where_no_folder_for_temporary_files_is_there_is_shared_memory(monkeypatch):
    """As in a container whose files are read-only."""
    make = selftest.tempfile.mkdtemp

    def refuse_all_but(*places):
        def mkdtemp(**where: str | None) -> str:
            if where["dir"] not in places:
                raise FileNotFoundError(2, "No usable temporary directory found")
            return make(**where)

        monkeypatch.setattr(selftest.tempfile, "mkdtemp", mkdtemp)

    shared = "/dev/shm"  # noqa: S108 - where it is
    refuse_all_but(shared)
    folder = selftest._private_folder()
    assert folder.parent == Path(shared)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    refuse_all_but()
    with pytest.raises(Unusable, match=r"no folder .* No usable temporary directory found"):
        selftest._private_folder()
