"""The load client: streams over grpc.aio and the generated stubs, one process.

Invariant: whoever answers, the loop is the same; only the address differs.
"""

import asyncio
import gc
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
import numpy as np
from conveyor_proto.v1.session_pb2_grpc import SessionServiceStub

from benchmarks.cases import INPUT_SIZE, Case, Client
from benchmarks.figures import Done, Figures, summarize
from benchmarks.lanes import FrameLane, Lane, MessageLane, spread
from benchmarks.population import PopulationLane

# Without a pool of its own, a second channel to the same address would share the first one's connection.
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


class LoadDriver:
    """Streams of all cases; between runs they are open and silent. See worker.Driver.

    Args:
        addresses: `host:port` of each target.
    """

    def __init__(self, addresses: dict[str, str]) -> None:
        self._addresses = addresses
        self._loop = asyncio.new_event_loop()
        self._channels: list[grpc.aio.Channel] = []
        self._lanes: dict[str, list[Lane]] = {}
        self._last: list[Lane] = []

    def open(self, case: Case) -> None:
        """Connects, creates the sessions and has each step once."""
        self._lanes[case.name] = self._loop.run_until_complete(self._open(case))
        # What lives until the end is not worth looking through in the middle of a run.
        gc.collect()
        gc.freeze()

    def run(self, case: Case, seconds: float) -> Done:
        """Puts all lanes of the case to work for that long."""
        self._last = self._lanes[case.name]
        self._loop.run_until_complete(_run(self._last, seconds))
        return Done(
            tokens=int(sum(lane.served.sum() for lane in self._last)),
            messages=sum(len(lane.took_ns) for lane in self._last),
        )

    def figures(self) -> Figures:
        """Of the last run."""
        took_ns = np.concatenate([np.array(lane.took_ns, np.int64) for lane in self._last])
        served = np.concatenate([lane.served for lane in self._last])
        return summarize(took_ns, served, self._last[0].request_bytes, self._last[0].reply_bytes)

    def close(self) -> None:
        """Ends streams and connections."""
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _open(self, case: Case) -> list[Lane]:
        rng = np.random.default_rng(case.sessions)
        tokens = rng.standard_normal((case.sessions, INPUT_SIZE), np.float32)
        address = self._addresses[case.target]
        lanes: list[Lane]
        if case.client is Client.SDK:
            lanes = [PopulationLane(address, tokens)]
        else:
            channels = [grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS) for _ in range(case.connections)]
            self._channels += channels
            make = FrameLane if case.client is Client.FRAMES else MessageLane
            lanes = [
                make(SessionServiceStub(channels[index % len(channels)]).Stream(), part, case.in_flight)
                for index, part in enumerate(spread(tokens, case.streams))
            ]
        for lane in lanes:
            await lane.open()
        return lanes

    async def _close(self) -> None:
        for lanes in self._lanes.values():
            for lane in lanes:
                await lane.close()
        for channel in self._channels:
            await channel.close()


async def _run(lanes: Sequence[Lane], seconds: float) -> None:
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    tasks: list[Any] = [lane.run(end_ns) for lane in lanes]
    await asyncio.gather(*tasks)
