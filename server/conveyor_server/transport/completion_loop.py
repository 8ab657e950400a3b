"""An asyncio event loop that waits at grpcio's completion queue instead of at sockets.

So one thread serves everything: the queue's events, then what they caused, then asyncio's own callbacks, timers and
coroutines. Invariant: whatever another thread asks for (`call_soon_threadsafe`) rings the queue's alarm, and so does a
socket of asyncio's that becomes ready; asyncio's socket to itself (signals), which every loop has and a server without
others needs no thread for, is looked at every 50 ms.
"""

import asyncio
import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

from conveyor_server.transport.completion import CompletionServer

_Arguments = TypeVarTuple("_Arguments")
_LOOK_S = 0.05
# Where no alarm can be rung, other threads are heard this late.
_DEAF_LOOK_S = 0.002
# Every loop of asyncio's has one to itself.
_OWN_SOCKETS = 1


class _Selector(selectors.BaseSelector):
    """Waits at the completion queue, and looks at sockets in passing."""

    def __init__(self) -> None:
        self.server: CompletionServer | None = None
        self.deferred: list[Callable[[], object]] = []
        self.late: list[Callable[[], object]] = []
        self.called = False
        self._look_at = 0.0
        self._sockets = selectors.EpollSelector()
        self._watcher: _Watcher | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._sockets.register(fileobj, events, data)
        if self._watcher is None and len(self._sockets.get_map()) > _OWN_SOCKETS:
            self._watcher = _Watcher(self._sockets.fileno(), self.wake)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._sockets.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._sockets.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._sockets.get_map()

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._sockets.close()

    def wake(self) -> None:
        """The next wait is none, and one under way ends. Any thread."""
        self.called = True
        if self.server is not None:
            self.server.alarm()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        server = self.server
        if self._watcher is not None:
            self._watcher.served()
        if server is None or server.stopped:
            self.run()
            self.run_late()
            return self._sockets.select(0 if self.deferred else timeout)
        longest = _LOOK_S if server.can_be_woken else _DEAF_LOOK_S
        busy = self.deferred or self.called or server.touched
        wait_s = 0.0 if busy else longest if timeout is None else min(timeout, longest)
        # What was put off before the turn began is a run, which what arrives meanwhile waits for.
        server.turn(wait_s, self.run, thorough=bool(self.deferred))
        if self.late:
            self.run_late()
        now = time.monotonic()
        if not self.called and now < self._look_at:
            return []
        self.called = False
        self._look_at = now + _LOOK_S
        return self._sockets.select(0)

    def run(self) -> None:
        """What was put off until everything that arrived in this turn is in."""
        deferred, self.deferred = self.deferred, []
        for callback in deferred:
            callback()

    def run_late(self) -> None:
        """What was put off until what there was to send is on its way."""
        late, self.late = self.late, []
        for callback in late:
            callback()


class _Watcher:
    """A thread that waits at the sockets while the loop waits at the queue, and wakes it when one is ready.

    Args:
        sockets: descriptor of the epoll that they are registered with.
        wake: wakes the loop.
    """

    def __init__(self, sockets: int, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._closed = False
        self._closing = os.eventfd(0)
        self._served = threading.Event()
        self._poll = select.poll()
        for descriptor in (sockets, self._closing):
            self._poll.register(descriptor, select.POLLIN)
        # A daemon: an abandoned loop, which nobody closes, must not keep the process.
        self._thread = threading.Thread(target=self._watch, name="sockets", daemon=True)
        self._thread.start()

    def served(self) -> None:
        """The loop has done what was ready: what is ready now is new. Loop thread."""
        self._served.set()

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        os.eventfd_write(self._closing, 1)
        self._served.set()
        self._thread.join()
        os.close(self._closing)

    def _watch(self) -> None:
        while True:
            self._poll.poll()
            self._served.clear()
            if self._closed:
                return
            self._wake()
            # Until then, it would only be seen again and again.
            self._served.wait()


class CompletionLoop(asyncio.SelectorEventLoop):
    """See the module. Made before the server, which joins with `attach`."""

    def __init__(self) -> None:
        self._turns = _Selector()
        super().__init__(self._turns)

    def attach(self, server: CompletionServer) -> None:
        """Waits at this server's queue from now on. It must have been started."""
        self._turns.server = server

    def defer(self, callback: Callable[[], object]) -> None:
        """Calls back once in this turn, after all that arrived in it and before anything is sent. Loop thread."""
        self._turns.deferred.append(callback)

    def after_sending(self, callback: Callable[[], object]) -> None:
        """Calls back once in this turn, after what there is to send was sent. Loop thread, within a deferred call."""
        self._turns.late.append(callback)

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Arguments]], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """As asyncio's. Any thread."""
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        self._turns.wake()
        return handle
