"""The event loop that waits at the completion queue: other threads, sockets and deferred calls."""

import asyncio
import socket
import threading
import time

import pytest
from conveyor_server.transport.completion_loop import CompletionLoop

from tests.unit.transport.conftest import until

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])


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
