"""What a worker tells about one run: first that it is done, then what it saw."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Done:
    """Told the moment a run ends, so that the clocks are read before anything is computed.

    Attributes:
        tokens: answered.
        messages: requests answered; a frame is one.
    """

    tokens: int
    messages: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What the client saw in a run.

    Attributes:
        p50_s: median round trip of a message, seconds.
        p99_s: 99th percentile.
        fewest: tokens of the session that got the fewest.
        most: tokens of the session that got the most.
        request_bytes: size of one request on the wire, without gRPC's and HTTP/2's own bytes; 0: there is no wire.
        reply_bytes: size of one reply.
    """

    p50_s: float
    p99_s: float
    fewest: int
    most: int
    request_bytes: int
    reply_bytes: int


def summarize(took_ns: NDArray[np.int64], served: NDArray[np.int64], request_bytes: int, reply_bytes: int) -> Figures:
    """Figures of the round trips `[messages]` in nanoseconds and the tokens of each session `[sessions]`."""
    p50, p99 = np.percentile(took_ns, [50, 99]) / 1e9 if took_ns.size else (0.0, 0.0)
    return Figures(float(p50), float(p99), int(served.min()), int(served.max()), request_bytes, reply_bytes)
