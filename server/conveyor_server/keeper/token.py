"""What a server that stops tells its streams to show to the next one: that it is still writing, and until when.

It carries no right: a session's fence is its epoch. Whoever shows one waits a little longer, and nothing else.
"""

import time
from dataclasses import dataclass

_PREFIX = "cvr1"
# A longer wait than any server takes to stop is not believed.
_MOST_S = 60.0


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Of a GoAway.

    Attributes:
        replica: that stops.
        until: unix seconds: by then it has written what it will.
    """

    replica: str
    until: float

    def text(self) -> str:
        """As it travels."""
        return f"{_PREFIX}:{self.until:.3f}:{self.replica}"

    @staticmethod
    def read(text: str) -> "ResumeToken | None":
        """The token; None where there is none, or it is not one of ours, which then only makes nobody wait."""
        prefix, _, rest = text.partition(":")
        until, _, replica = rest.partition(":")
        if prefix != _PREFIX:
            return None
        try:
            return ResumeToken(replica, float(until))
        except ValueError:
            return None

    def left_s(self) -> float:
        """Seconds until it has written what it will."""
        return min(_MOST_S, max(0.0, self.until - time.time()))
