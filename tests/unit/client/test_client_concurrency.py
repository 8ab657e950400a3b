"""What only one of the two clients does, against a server behind real gRPC: threads, interrupts, cancelled tasks."""
# ruff: noqa: SIM117 - a session in its client reads as it is.

import asyncio
import contextlib
import signal
import threading

import conveyor
import conveyor.aio
import numpy as np
import pytest

ONE = np.array([1, 0], np.float32)


@pytest.fixture
def server(grpc_server):
    return grpc_server


def test_threads_may_share_a_client(server):
    failures = []

    def work(client, number):
        try:
            with client.session("sum", session_id=f"t{number}") as s:
                for count in range(1, 21):
                    assert s.step(ONE)[0] == count
        except BaseException as error:
            failures.append(error)

    with conveyor.connect(server.target) as client:
        threads = [threading.Thread(target=work, args=(client, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        server.cut()
        for thread in threads:
            thread.join()
    assert not failures


async def test_an_answer_is_not_held_back_by_a_source_that_waits(server):
    """With asyncio, also where several may be in flight."""
    answered = asyncio.Event()

    async def microphone():
        for _ in range(3):
            answered.clear()
            yield ONE
            await asyncio.wait_for(answered.wait(), 5)

    async with conveyor.aio.connect(server.target) as client, client.session("sum") as s:
        got = []
        async for y in s.stream(microphone()):
            got.append(y[0])
            answered.set()
        assert got == [1, 2, 3]


async def test_a_cancelled_step_is_applied_and_its_answer_dropped(server):
    async with conveyor.aio.connect(server.target) as client, client.session("sum") as s:
        task = asyncio.create_task(s.step(ONE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await s.step(ONE))[0] == 2


async def test_a_cancelled_opening_leaves_nothing(server):
    async with conveyor.aio.connect(server.target) as client:
        server.mute = True
        opening = asyncio.ensure_future(client.session("sum"))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        server.mute = False
        async with client.session("mix"):
            assert [session.model for session in server.fake.sessions.values()] == ["mix"]


async def test_leaving_an_asynchronous_source_early_ends_it(server):
    ended = asyncio.Event()

    async def endless():
        try:
            while True:
                yield ONE
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with conveyor.aio.connect(server.target) as client, client.session("sum") as s:
        source = endless()
        async with contextlib.aclosing(s.stream(source)) as answers:
            async for _ in answers:
                break
        await source.aclose()
        assert ended.is_set()


def test_the_blocking_client_works_inside_a_running_loop(server):
    async def notebook():
        with conveyor.connect(server.target) as client, client.session("sum") as s:
            return s.step(ONE)[0]

    assert asyncio.run(notebook()) == 1


def test_an_asynchronous_source_needs_the_asynchronous_client(server):
    async def chunks():
        yield ONE

    with conveyor.connect(server.target) as client, client.session("sum") as s:
        with pytest.raises(TypeError, match=r"conveyor\.aio"):
            next(s.stream(chunks()))


def test_an_interrupt_ends_a_wait_and_the_session_goes_on(server):
    """Ctrl-C, as Python delivers it: an exception in the waiting thread."""

    def interrupted(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupted)
    try:
        with conveyor.connect(server.target) as client, client.session("sum") as s:
            server.mute = True
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                for _ in s.stream([ONE] * 10):
                    pass
            server.mute = False
            server.cut()
            assert s.step(ONE)[0] == s.applied_seq == server.fake.sessions[s.id].applied
    finally:
        signal.signal(signal.SIGALRM, previous)
