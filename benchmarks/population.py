"""The closed loop of frames, asked through the SDK: what its comfort costs beside raw frames.

Invariant: as of the other lanes; the SDK numbers the steps and reads the answers.
"""

import time
from typing import Any

import conveyor.aio
import numpy as np

from benchmarks.cases import MODEL
from benchmarks.lanes import Counts, LoadError, Tokens


class PopulationLane:
    """One token of every session per step, each step after the answer to the last. See lanes.Lane.

    Args:
        address: `host:port` of the server.
        tokens: `[sessions, 64]`.
    """

    def __init__(self, address: str, tokens: Tokens) -> None:
        self._client = conveyor.aio.connect(address)
        self._tokens = tokens
        self._population: Any = None
        self.served: Counts = np.zeros(len(tokens), np.int64)
        self.took_ns: list[int] = []
        # As the raw frames of the same rows; the SDK does not tell.
        self.request_bytes = self.reply_bytes = 0

    async def open(self) -> None:
        """As Lane.open."""
        self._population = await self._client.population(MODEL, len(self._tokens))
        await self.run(0)

    async def run(self, end_ns: int) -> None:
        """As Lane.run."""
        self.served[:] = 0
        self.took_ns = []
        now_ns = 0
        while now_ns < end_ns or not self.took_ns:
            sent_ns = time.perf_counter_ns()
            outputs = await self._population.step(self._tokens)
            now_ns = time.perf_counter_ns()
            if outputs.shape != self._tokens.shape:
                raise LoadError(f"a step of {self._tokens.shape} was answered by {outputs.shape}")
            self.took_ns.append(now_ns - sent_ns)
            self.served += 1

    async def close(self) -> None:
        """As Lane.close."""
        await self._population.close()
        await self._client.close()
