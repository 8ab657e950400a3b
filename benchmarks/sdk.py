"""The load asked through the SDK: what its comfort costs beside the wire alone.

Invariant: as of the other lanes; the SDK's blocking client numbers the steps and reads the answers.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import conveyor
import numpy as np
from conveyor.bench import LoadError, LoadSpec
from conveyor.bench.model import inputs_of
from numpy.typing import NDArray

from benchmarks.cases import Case, Client
from benchmarks.figures import Done, Figures, summarize

Tokens: TypeAlias = NDArray[np.float32]


class SdkLane:
    """A session, or a population of them. See load.Lane.

    Args:
        address: `host:port` of the server.
        case: what load.
    """

    def __init__(self, address: str, case: Case) -> None:
        (spec,) = inputs_of(address, LoadSpec(model=case.model))
        rng = np.random.default_rng(case.sessions)
        self._tokens: Tokens = rng.standard_normal((case.sessions, *spec.shape), np.float32)
        self._case = case
        self._client = conveyor.connect(address)
        self._stepped: Any = None
        self._took_ns: list[int] = []

    def open(self) -> None:
        """As Lane.open."""
        if self._case.client is Client.POPULATION:
            self._stepped = self._client.population(self._case.model, self._case.sessions)
        else:
            self._stepped = self._client.session(self._case.model)
        self.run(0.0)

    def run(self, seconds: float) -> Done:
        """As Lane.run."""
        end_ns = time.perf_counter_ns() + int(seconds * 1e9)
        if self._case.client is Client.PIPELINE:
            self._took_ns = pipelined(self._stepped, self._tokens[0], end_ns)
        else:
            tokens = self._tokens if self._case.client is Client.POPULATION else self._tokens[0]
            self._took_ns = ping_pong(self._stepped, tokens, end_ns)
        return Done(len(self._took_ns) * self._case.sessions, len(self._took_ns))

    def figures(self) -> Figures:
        """As Lane.figures. A step of a population is one of each of its sessions."""
        count = len(self._took_ns)
        return summarize(np.array(self._took_ns, np.int64), count, count)

    def tend(self) -> None:
        """The SDK has threads for that."""

    def close(self) -> None:
        """As Lane.close."""
        if self._stepped is not None:
            self._stepped.close()
        self._client.close()


def ping_pong(stepped: Any, tokens: Tokens, end_ns: int) -> list[int]:
    """`step(tokens)` until `end_ns` (perf_counter_ns), once at least; nanoseconds of each."""
    took_ns: list[int] = []
    now_ns = time.perf_counter_ns()
    while now_ns < end_ns or not took_ns:
        sent_ns = now_ns
        outputs = stepped.step(tokens)
        now_ns = time.perf_counter_ns()
        took_ns.append(now_ns - sent_ns)
    _expect(outputs, tokens)
    return took_ns


def pipelined(session: Any, token: Tokens, end_ns: int) -> list[int]:
    """`stream` of the same token until `end_ns`, one at least; nanoseconds from a token's being taken to its answer."""
    sent_ns: deque[int] = deque()

    def tokens() -> Iterator[Tokens]:
        now_ns = 0
        while now_ns < end_ns:
            now_ns = time.perf_counter_ns()
            sent_ns.append(now_ns)
            yield token

    took_ns, outputs = [], None
    for outputs in session.stream(tokens()):  # noqa: B007 - the last one is looked at
        took_ns.append(time.perf_counter_ns() - sent_ns.popleft())
    _expect(outputs, token)
    return took_ns


def _expect(outputs: Any, tokens: Tokens) -> None:
    if outputs.shape != tokens.shape:
        raise LoadError(f"a step of {tokens.shape} was answered by {outputs.shape}")
