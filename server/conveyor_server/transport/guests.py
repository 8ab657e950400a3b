"""Streams of callers who have shown who they are: sent away when that no longer counts.

Invariant: a stream outlives the token that opened it, or its place in the access file, by some seconds at most. It is
sent away as by a server that stops: what was accepted is answered, and a client that has a new token goes on with that.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from conveyor_server.errors import Refused
from conveyor_server.identity.gate import Admitted, Gate
from conveyor_server.transport.ends import Lingering

_LOOK_S = 1.0
_log = logging.getLogger("conveyor")
Again = Callable[[], Admitted]


class Guests:
    """Core thread only.

    Args:
        gate: that they have passed.
        send_away: ends a stream in order.
    """

    def __init__(self, gate: Gate, send_away: Callable[[Lingering], None]) -> None:
        self._gate = gate
        self._send_away = send_away
        self._calls: dict[Lingering, tuple[Admitted, Again]] = {}
        self._generation = gate.generation
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, call: Lingering, admitted: Admitted, again: Again) -> None:
        """A stream begins; `again` asks the gate as if it began now."""
        self._calls[call] = admitted, again
        self._plan()

    def leave(self, call: Lingering) -> None:
        """A stream is gone."""
        self._calls.pop(call, None)
        if not self._calls and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self, now: float) -> None:
        """Sends those away who would not be let in again.

        Args:
            now: unix seconds.
        """
        # Has the files looked at, which may raise the generation.
        changed = self._gate.access is not None and self._gate.generation != self._generation
        self._generation = self._gate.generation
        for call, (admitted, again) in list(self._calls.items()):
            if not changed and admitted.until > now:
                continue
            why = _why_not(admitted, again)
            if why:
                _log.info("a stream of %r is sent away: %s", admitted.caller.name, why)
                del self._calls[call]
                self._send_away(call)

    def _plan(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.look(time.time())
        if self._calls:
            self._plan()


def _why_not(admitted: Admitted, again: Again) -> str:
    """Why somebody who was let in would not be now, as the same; "": they would."""
    try:
        return "" if again().caller == admitted.caller else "they are known as somebody else now"
    except Refused as refusal:
        return refusal.fault.message
