"""How long to wait before the next try, and when to stop: pure, time and chance are passed in."""

from dataclasses import dataclass

import grpc

# A stream that ends with one of these was cut, and is resumed. Any other status says that trying again as before is
# useless: no rights, no such service, a message that is too large.
_CUTS = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
# Refusals of an attach that waiting or another server cures.
PASSING = frozenset({"DRAINING", "MODEL_NOT_READY", "OVERLOADED", "STORE_UNAVAILABLE"})


def waits(reason: str, *, opened: bool) -> bool:
    """Whether an attach, flush, detach or close that was refused is asked for again on the same stream.

    Args:
        reason: why it was refused.
        opened: it is about a session that was open before. One that has to find a place again, after its server was
            lost, waits for it; a new one is told that there is none.
    """
    return reason == "STORE_UNAVAILABLE" or (opened and reason == "SESSIONS_EXHAUSTED")


def is_cut(code: grpc.StatusCode, reason: str) -> bool:
    """Whether a stream that ended so is worth opening again."""
    return reason in PASSING or (not reason and code in _CUTS)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter, bounded in total.

    Attributes:
        first_s: upper bound of the first delay; each next one doubles it.
        longest_s: upper bound of any delay.
        connect_s: before the first answer ever, the time after which one gives up.
        total_s: later, the time without an answer after which one gives up.
    """

    first_s: float = 0.05
    longest_s: float = 1.0
    connect_s: float = 5.0
    total_s: float = 30.0


class Backoff:
    """Where one link, or one call, stands between failures and answers.

    Attributes:
        bound_s: the time without an answer after which it is given up now.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._since_s: float | None = None
        self._attempts = 0
        self.bound_s = policy.connect_s

    def failed(self, now_s: float, chance: float, *, at_least_s: float = 0.0) -> float | None:
        """Seconds to wait before the next try; None: give up.

        Args:
            now_s: any clock that does not go back.
            chance: 0 to 1, drawn anew for each call; spreads many clients over the upper half of the delay.
            at_least_s: what the server asked for.
        """
        if self._since_s is None:
            self._since_s = now_s
        longest_s = min(self.policy.longest_s, self.policy.first_s * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        delay_s = max(at_least_s, longest_s * (0.5 + chance / 2))
        if now_s + delay_s - self._since_s > self.bound_s:
            return None
        return delay_s

    def progressed(self) -> None:
        """An answer came: the next failure is a first one."""
        self.bound_s = self.policy.total_s
        self.restart()

    def restart(self) -> None:
        """Somebody asks anew after it was given up."""
        self._since_s = None
        self._attempts = 0
