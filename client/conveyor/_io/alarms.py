"""The deadlines of one event loop's waits, behind one timer: nearly every wait ends long before its own deadline."""

import asyncio
import math


class Alarms:
    """Settles futures with False when they take too long. One loop's."""

    def __init__(self) -> None:
        self._deadlines: dict[asyncio.Future[bool], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def set(self, future: asyncio.Future[bool], timeout_s: float) -> None:
        """From now on the future has so long. Call `drop` once it is settled."""
        at = future.get_loop().time() + timeout_s
        self._deadlines[future] = at
        if at < self._rings_at:
            self._arm(future.get_loop(), at)

    def drop(self, future: asyncio.Future[bool]) -> None:
        """The future needs no deadline any more."""
        self._deadlines.pop(future, None)

    def close(self) -> None:
        """Nothing rings from here on."""
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = at
        self._timer = loop.call_at(at, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, rang_at = None, self._rings_at
        self._rings_at = math.inf
        for future, at in list(self._deadlines.items()):
            if at <= rang_at:
                del self._deadlines[future]
                if not future.done():
                    future.set_result(False)
        if self._deadlines:
            self._arm(loop, min(self._deadlines.values()))
