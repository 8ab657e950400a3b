"""A store that is away when a test says so, or slow, or forgets to say that it has done something."""

import threading
from typing import Any

from conveyor_server.store.contract import StateStore, StoreUnavailable

_CALLS = ("create", "take", "load", "put", "delete", "listed", "count", "sweep")


class FlakyStore:
    """Another store, with troubles.

    Attributes:
        inner: the other.
        away: every call fails.
        mute: calls are done, and then fail: what was done is not known.
        calls: names of the calls that came, in order.
        gate: calls wait until it is set.
    """

    def __init__(self, inner: StateStore) -> None:
        self.inner = inner
        self.name = f"flaky {inner.name}"
        self.shared = True
        self.away = self.mute = False
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        if name not in _CALLS:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            assert self.gate.wait(20)
            if self.away:
                raise StoreUnavailable("it is away")
            answer = getattr(self.inner, name)(*arguments)
            if self.mute:
                raise StoreUnavailable("it is mute")
            return answer

        return call

    def close(self) -> None:
        """The inner store is the test's to close."""
