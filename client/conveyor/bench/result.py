"""What one run of a load gave."""

from dataclasses import dataclass, field

import numpy as np

from conveyor.bench.histogram import Histogram
from conveyor.bench.ledger import Integers


def _none() -> Integers:
    return np.zeros(0, np.int64)


@dataclass(slots=True)
class LoadResult:
    """Counts and latencies of a run.

    Attributes:
        elapsed_s: from the first step sent to the last answer.
        steps: answered with a result.
        time_steps: in them.
        requests: messages sent; a frame is one.
        replies: messages received.
        request_bytes: of messages sent, everything but TCP counted.
        reply_bytes: of messages received.
        latency: of each step, from when it was sent, or in an open loop from when it fell due.
        refused: by reason: how long it took to be refused.
        unsent: steps that fell due and were never sent, as their sessions had too many unanswered.
        unsent_oldest_s: how long the first of them had been waiting at the end.
        shed: steps that were given up as they fell due, see LoadSpec.shed.
        served: steps answered, of each session.
        served_streams: steps answered, of each stream.
        client_cpu_s: CPU time of the client's processes.
        busiest_cpu_s: CPU time of the one that took most; near `elapsed_s`, the client is what was measured.
        tick_s: the client's own share of an open loop's latency, at most about this much.
    """

    elapsed_s: float = 0.0
    steps: int = 0
    time_steps: int = 0
    requests: int = 0
    replies: int = 0
    request_bytes: int = 0
    reply_bytes: int = 0
    latency: Histogram = field(default_factory=Histogram)
    refused: dict[str, Histogram] = field(default_factory=dict)
    unsent: int = 0
    unsent_oldest_s: float = 0.0
    shed: int = 0
    served: Integers = field(default_factory=_none)
    served_streams: Integers = field(default_factory=_none)
    client_cpu_s: float = 0.0
    busiest_cpu_s: float = 0.0
    tick_s: float = 0.0

    @property
    def steps_per_s(self) -> float:
        """Steps answered per second."""
        return self.steps / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def busiest_cores(self) -> float:
        """Cores that the busiest of the client's processes used, 0 to 1."""
        return self.busiest_cpu_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def active_streams(self) -> int:
        """Streams that had an answer."""
        return int(np.count_nonzero(self.served_streams))

    def add(self, other: "LoadResult") -> None:
        """Takes in the result of another process that ran at the same time."""
        self.elapsed_s = max(self.elapsed_s, other.elapsed_s)
        for name in ("steps", "time_steps", "requests", "replies", "request_bytes", "reply_bytes", "unsent", "shed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.client_cpu_s += other.client_cpu_s
        self.busiest_cpu_s = max(self.busiest_cpu_s, other.busiest_cpu_s)
        self.tick_s = max(self.tick_s, other.tick_s)
        self.unsent_oldest_s = max(self.unsent_oldest_s, other.unsent_oldest_s)
        self.latency.add(other.latency)
        for reason, took in other.refused.items():
            self.refused.setdefault(reason, Histogram()).add(took)
        self.served = np.concatenate([self.served, other.served])
        self.served_streams = np.concatenate([self.served_streams, other.served_streams])
