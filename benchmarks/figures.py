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
        streams: streams that were served.
        fewest_messages: answered on the stream that got the fewest.
        most_messages: answered on the stream that got the most.
        request_bytes: of one request, everything but TCP counted; 0: there is no wire, or the SDK does not tell.
        reply_bytes: of one reply.
    """

    p50_s: float
    p99_s: float
    fewest: int
    most: int
    streams: int = 0
    fewest_messages: int = 0
    most_messages: int = 0
    request_bytes: float = 0.0
    reply_bytes: float = 0.0


def summarize(took_ns: NDArray[np.int64], fewest: int, most: int) -> Figures:
    """Figures of the round trips `[messages]` in nanoseconds on one stream, or on none."""
    p50, p99 = np.percentile(took_ns, [50, 99]) / 1e9 if took_ns.size else (0.0, 0.0)
    count = int(took_ns.size)
    return Figures(float(p50), float(p99), fewest, most, 1, count, count)
