"""The completion queue: what it leans on, what it survives, and that it is prompt."""

import ast
import asyncio
import inspect
import re
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.transport import completion, selftest
from conveyor_server.transport.completion import CompletionServer, internals
from conveyor_server.transport.completion.server import _Inline
from conveyor_server.transport.completion_loop import CompletionLoop
from conveyor_server.transport.grpc_cq import CqServer
from conveyor_server.transport.selftest import Mirror, Unusable
from conveyor_server.transport.stream import StreamCall
from grpc import _server
from grpc._cython import cygrpc

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])
PACKAGE = Path(completion.__file__).parent


def grpc_server() -> grpc.Server:
    return grpc.server(_Inline(1))


# ---------------------------------------------------------------- grpcio's internals


def used(*owners: str) -> set[str]:
    """Attributes that the package takes of a name, or of an attribute of self."""
    trees = [ast.parse(file.read_text()) for file in sorted(PACKAGE.glob("*.py"))]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }


@pytest.mark.parametrize(
    ("what", "owners", "where", "looked_for"),
    [
        ("grpc._server", ("_server",), _server, internals.OF_MODULE),
        ("cygrpc", ("cygrpc",), cygrpc, internals.OF_CYGRPC),
        ("the state of grpc.server", ("state", "self._state"), grpc_server()._state, internals.OF_STATE),
        ("a call's state", ("rpc", "self._rpc"), _server._RPCState(), None),
    ],
    ids=["module", "cygrpc", "server", "call"],
)
def test_this_grpcio_has_all_that_is_used_of_it(what, owners, where, looked_for):
    names = used(*owners)
    assert names, "the package was rewritten: this test looks at nothing"
    missing = sorted(name for name in names if not hasattr(where, name))
    assert not missing, f"{what} of grpcio {grpc.__version__} has no {', '.join(missing)}: completion uses it"
    if looked_for is not None:
        assert names == set(looked_for), "what is looked for at the start is not what is used"


def test_nothing_else_of_the_server_imports_what_is_within_grpcio():
    server = PACKAGE.parents[1]
    files = {file for file in server.rglob("*.py") if re.search(r"\bgrpc import _|\bgrpc\._", file.read_text())}
    assert files <= set(PACKAGE.glob("*.py"))
    assert PACKAGE / "stream.py" in files, "the package was rewritten: this test looks at nothing"


def test_this_grpcio_has_the_calls_that_are_used_of_it():
    where = f"of grpcio {grpc.__version__} is another one: completion uses it"
    parameters = list(inspect.signature(_server._handle_call).parameters)
    assert parameters[:4] == ["rpc_event", "method_with_handler", "interceptor_pipeline", "thread_pool"], where
    assert len(parameters) == 5, f"_handle_call {where}"
    assert {"state", "call"} <= inspect.signature(_server._RequestIterator.__init__).parameters.keys(), where
    assert {"_state", "_call"} <= vars(_server._RequestIterator(None, None, None)).keys(), f"_RequestIterator {where}"
    for owner, name in (
        *((cygrpc.Server, name) for name in ("request_call", "request_registered_call", "start")),
        (cygrpc.CompletionQueue, "poll"),
        (cygrpc.Call, "start_server_batch"),
    ):
        assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} {where}"
    assert "experimental_non_blocking" in inspect.getsource(_server), f"a stream's non-blocking hook {where}"


@pytest.mark.parametrize("name", internals.OF_MODULE)
def test_a_grpcio_without_one_of_them_is_unusable_and_says_which(monkeypatch, name):
    server = grpc_server()
    monkeypatch.delattr(_server, name)
    with pytest.raises(Unusable, match=rf"grpc\._server of grpcio .* has no {name}$"):
        CompletionServer(server, max_unsent_bytes=1)


def test_a_server_without_a_state_is_unusable():
    with pytest.raises(Unusable, match=r"grpc.server's state of grpcio .* has no active_rpc_count, completion_queue"):
        CompletionServer(object(), max_unsent_bytes=1)


def test_the_version_that_runs_is_one_that_is_known():
    assert grpc.__version__ in completion.TESTED, "add it to the table once the tests pass on it"


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


@pytest.mark.parametrize("at", ["_attach", "_detach", "half_close", "__init__"])
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
    if at == "_attach":
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


async def until(done) -> None:
    """Takes turns of the loop until it is so."""
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 - what is waited for is found in a log or a list
            await asyncio.sleep(0.001)


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


# ---------------------------------------------------------------- the loop


@on_the_queue
async def test_other_threads_are_heard_at_once(server) -> None:
    loop, slowest = asyncio.get_running_loop(), []

    def ask() -> None:
        for _ in range(100):
            heard, began = threading.Event(), time.monotonic()
            loop.call_soon_threadsafe(heard.set)
            assert heard.wait(20)
            slowest.append(time.monotonic() - began)

    await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(3)))
    # With nothing to wake it, the loop looks every 50 ms.
    assert sorted(slowest)[len(slowest) // 2] < 0.02
    assert len(slowest) == 300


@on_the_queue
async def test_sockets_of_asyncio_are_heard_at_once(server) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def mirror() -> None:
        with theirs:
            while data := theirs.recv(100):
                theirs.sendall(data)

    with ours:
        answering = asyncio.create_task(asyncio.to_thread(mirror))
        began = time.monotonic()
        for turn in range(100):
            await loop.sock_sendall(ours, b"%d" % turn)
            assert await loop.sock_recv(ours, 100) == b"%d" % turn
        assert time.monotonic() - began < 2.0
    await answering


def test_a_loop_that_is_closed_leaves_no_thread() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            loop, heard = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(ours, heard.set)
            theirs.sendall(b"x")
            await asyncio.wait_for(heard.wait(), 20)
            loop.remove_reader(ours)
            assert any(thread.name == "sockets" for thread in threading.enumerate())

    before = set(threading.enumerate())
    with asyncio.Runner(loop_factory=CompletionLoop) as runner:
        runner.run(main())
    assert not {thread for thread in threading.enumerate() if thread.name == "sockets"} - before


def test_a_loop_without_sockets_of_its_own_needs_no_thread() -> None:
    async def main() -> None:
        await asyncio.sleep(0.01)
        assert not {thread for thread in threading.enumerate() if thread.name == "sockets"} - before

    before = set(threading.enumerate())
    with asyncio.Runner(loop_factory=CompletionLoop) as runner:
        runner.run(main())


@on_the_queue
async def test_deferred_calls_come_once_and_before_what_they_send(server) -> None:
    loop, calls = asyncio.get_running_loop(), []
    loop.defer(lambda: calls.append("first"))
    loop.defer(lambda: calls.append("second") or loop.defer(lambda: calls.append("third")))
    await until(lambda: len(calls) == 3)
    assert calls == ["first", "second", "third"]


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
