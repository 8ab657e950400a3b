"""How fast streams are read: so many messages a second of a tenant, and what comes faster waits, unread.

Invariant: nothing is refused or lost for it. What is not read stays with the client, whom gRPC's flow control slows
down; its neighbours' messages are read at their own pace. Time is an argument.

The Generic Cell Rate Algorithm (ITU-T I.371), with a second's worth of messages as its tolerance.
"""

from weakref import WeakValueDictionary

from conveyor_server.identity.caller import Caller

_BURST_S = 1.0


class Pace:
    """Of streams that are counted together. Core thread only.

    Args:
        rate: messages a second.
    """

    def __init__(self, rate: float) -> None:
        self._each_s = 1.0 / rate
        # When all that was read would have been read, one after the other at this rate.
        self._done_at = float("-inf")

    def take(self, now: float) -> float:
        """A message was read; returns for how many seconds its stream is to read no other.

        Args:
            now: any seconds that do not go back.
        """
        self._done_at = max(self._done_at, now - _BURST_S) + self._each_s
        return max(0.0, self._done_at - now)


class Paces:
    """Whose streams are counted together: a tenant's; of no tenant, each by itself. Core thread only.

    Args:
        rate: messages a second; 0: any number.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        # While one of its streams is open.
        self._known: WeakValueDictionary[str, Pace] = WeakValueDictionary()

    def of(self, caller: Caller) -> Pace | None:
        """For a stream of theirs; None: it is read as fast as it comes."""
        if not self._rate:
            return None
        pace = self._known.get(caller.tenant) if caller.tenant else None
        if pace is None:
            pace = Pace(self._rate)
            if caller.tenant:
                self._known[caller.tenant] = pace
        return pace
