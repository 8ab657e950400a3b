"""Churn: sessions that connect, step, are cut off and come back, for half an hour, while memory is watched.

Each cycle has a connection of its own through a small proxy: it resumes one of the sessions or creates it, takes a few
steps, and then ends in one of four ways: the connection is reset (as when a machine dies), the call is cancelled, the
stream is half-closed, or the session is closed. Invariant: every cycle goes on from the step that the session applied
last, and every answer is checked, so that churn that breaks sessions is no success.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import matplotlib as mpl
import numpy as np
from conveyor_proto.v1 import session_pb2
from conveyor_proto.v1.session_pb2_grpc import SessionServiceStub

from benchmarks.program import Findings, Goal, run
from benchmarks.service import Service
from benchmarks.stage import MODEL, resident_bytes, say, stage

mpl.use("agg")
import matplotlib.pyplot as plt  # the backend is chosen before

_SESSIONS = 64
_STEPS = 3
_AT_ONCE = 4
_TOKEN = np.linspace(-1.0, 1.0, 64, dtype=np.float32).tobytes()
_ENDS = ("reset", "cancelled", "half-closed", "closed")
_WARM_UP_SHARE = 1 / 6
# What a flat line may still rise, between the quarter after the warm-up and the last one.
_MOST_GROWTH = 0.01
_MOST_GROWTH_BYTES = 2 << 20
_ANSWER_S = 20.0
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


@dataclass(slots=True)
class Churned:
    """What was seen.

    Attributes:
        ends: cycles by the way they ended.
        steps: that were answered.
        at_s, resident: seconds since the start, and the server's resident bytes then.
    """

    ends: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    at_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


class Proxy:
    """Passes bytes on to the server until the connection is reset. One connection; on the running loop."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listens; returns the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Resets what is still connected, both ways, and listens no more."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            # Not closed in order: whoever is at the other end is not told.
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(*self._target)
        self._writers += [writer, ours]
        for source, sink in ((reader, ours), (theirs, writer)):
            task = asyncio.create_task(_pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        sink.write_eof()


async def cycle(address: str, session_id: str, end: str, churned: Churned) -> None:
    """Connects, resumes or creates a session, steps, and ends that way.

    Raises:
        AssertionError: an answer is not the one that belongs there.
    """
    host, _, port = address.rpartition(":")
    proxy = Proxy(host, int(port))
    channel = grpc.aio.insecure_channel(await proxy.open(), _CHANNEL_OPTIONS)
    try:
        call: Any = SessionServiceStub(channel).Stream()
        attach = session_pb2.AttachSession(
            handle=1, mode=session_pb2.AttachSession.MODE_RESUME_OR_CREATE, session_id=session_id, model=MODEL
        )
        attached = (await _ask(call, session_pb2.StreamRequest(attach=attach))).attached
        _check(attached.session.session_id == session_id, f"attached as {attached}")
        for seq in range(attached.session.applied_seq + 1, attached.session.applied_seq + 1 + _STEPS):
            request = session_pb2.StreamRequest(step=session_pb2.Step(handle=1, seq=seq, acked_seq=seq - 1))
            request.step.inputs.add(data=_TOKEN)
            answer = (await _ask(call, request)).result
            _check(answer.seq == seq and len(answer.outputs[0].data) == len(_TOKEN), f"step {seq} got {answer}")
            churned.steps += 1
        if end == "closed":
            close = session_pb2.CloseAttachedSession(handle=1)
            _check((await _ask(call, session_pb2.StreamRequest(close=close))).HasField("detached"), "no goodbye")
        if end in {"closed", "half-closed"}:
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        elif end == "cancelled":
            call.cancel()
        churned.ends[end] += 1
    finally:
        # First: what is cut is cut at once, and the channel closes over nothing.
        await proxy.close()
        await channel.close()


async def _ask(call: Any, request: session_pb2.StreamRequest) -> session_pb2.StreamResponse:
    await call.write(request)
    answer = await asyncio.wait_for(call.read(), _ANSWER_S)
    _check(answer is not grpc.aio.EOF, f"the stream ended: {call}")
    return answer  # type: ignore[no-any-return]


def _check(right: bool, what: str) -> None:
    if not right:
        raise AssertionError(what)


async def _churn(service: Service, churned: Churned, seconds: float, rate_per_s: float) -> None:
    rng = random.Random(7)  # noqa: S311 - for variety, not for secrecy
    began = time.monotonic()
    free = [f"churn-{number}" for number in range(_SESSIONS)]

    async def work() -> None:
        while time.monotonic() - began < seconds:
            started = time.monotonic()
            session_id = free.pop(rng.randrange(len(free)))
            await cycle(service.address, session_id, rng.choice(_ENDS), churned)
            free.append(session_id)
            await asyncio.sleep(max(0.0, _AT_ONCE / rate_per_s - (time.monotonic() - started)))

    async def watch(every_s: float) -> None:
        while True:
            churned.at_s.append(time.monotonic() - began)
            churned.resident.append(resident_bytes(service.pid))
            await asyncio.sleep(every_s)

    watching = asyncio.create_task(watch(min(5.0, seconds / 40)))
    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(_AT_ONCE):
                workers.create_task(work())
    finally:
        watching.cancel()


def growth(at_s: Sequence[float], resident: Sequence[int]) -> tuple[float, float]:
    """Mean resident bytes in the quarter after the warm-up (a sixth of the time), and in the last quarter."""
    end = at_s[-1]
    rest = [(at, size) for at, size in zip(at_s, resident, strict=True) if at >= end * _WARM_UP_SHARE]
    quarter = max(1, len(rest) // 4)
    first, last = rest[:quarter], rest[-quarter:]
    return sum(size for _, size in first) / len(first), sum(size for _, size in last) / len(last)


def judge(transport: str, churned: Churned) -> Goal:
    """Memory is flat: the last quarter is at most 1 % or 2 MiB above the quarter after the warm-up."""
    first, last = growth(churned.at_s, churned.resident)
    flat = last - first <= max(_MOST_GROWTH * first, _MOST_GROWTH_BYTES)
    text = (
        f"{transport}: {sum(churned.ends.values()):,} cycles in {churned.at_s[-1] / 60:.1f} minutes, {churned.steps:,} "
        f"steps; resident {first / 2**20:.1f} MiB after the warm-up, {last / 2**20:.1f} MiB at the end"
    )
    return Goal(text, flat)


def draw(found: dict[str, Churned], path: Path) -> None:
    """The memory of each server over time."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for transport, churned in found.items():
        minutes = [at / 60 for at in churned.at_s]
        axes.plot(minutes, [size / 2**20 for size in churned.resident], label=transport, linewidth=1.4)
    axes.set(xlabel="minutes", ylabel="resident MiB", title="Memory of the server under churn")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def measure(settings: argparse.Namespace) -> Findings:
    """Churns at one server of each transport, all at the same time."""
    seconds = 4.0 if settings.quick else settings.minutes * 60
    found: dict[str, Churned] = {}
    with stage() as scene:
        services = {transport: scene.serve("--transport", transport) for transport in settings.transports}

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as group:
                for transport, service in services.items():
                    found[transport] = Churned()
                    group.create_task(_churn(service, found[transport], seconds, settings.rate))

        say(f"churning for {seconds / 60:.1f} minutes")
        asyncio.run(all_of_them())
    draw(found, settings.out / "churn.png")
    figures = {
        transport: {
            "ends": dict(churned.ends),
            "steps": churned.steps,
            "at_s": [round(at, 1) for at in churned.at_s],
            "resident_bytes": churned.resident,
        }
        for transport, churned in found.items()
    }
    return Findings(figures, [judge(transport, churned) for transport, churned in found.items()])


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (%(default)s)")
    parser.add_argument("--rate", type=float, default=25.0, help="cycles a second at each server (%(default)s)")
    parser.add_argument(
        "--transports", nargs="+", default=["cq", "aio"], choices=["cq", "aio"], help="one server each (%(default)s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; returns the exit status."""
    return run("churn", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
