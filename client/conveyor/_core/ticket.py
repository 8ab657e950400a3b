"""A promise of one answer, settled by whoever drives the core."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from conveyor.errors import ConveyorError

T = TypeVar("T")


class Ticket(Generic[T]):
    """One answer that is not there yet: settled once, with a value or an error.

    Callbacks run inside the call that settles the ticket: they only wake somebody, and never call back into the core.
    """

    __slots__ = ("_callbacks", "_error", "_value", "done")

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._error: ConveyorError | None = None
        self._callbacks: list[Callable[[], None]] | None = None

    def resolve(self, value: T) -> None:
        """Settles with a value; does nothing where the ticket is settled already."""
        if not self.done:
            self._value = value
            self._settle()

    def fail(self, error: ConveyorError) -> None:
        """Settles with an error; does nothing where the ticket is settled already."""
        if not self.done:
            self._error = error
            self._settle()

    @property
    def failed(self) -> bool:
        """Settled with an error."""
        return self._error is not None

    def when_done(self, callback: Callable[[], None]) -> None:
        """Calls back once the ticket is settled: at once, if it is."""
        if self.done:
            callback()
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def result(self) -> T:
        """The value of a settled ticket, or its error raised."""
        if self._error is not None:
            # Several may raise one error: each starts its own traceback.
            raise self._error.with_traceback(None)
        return cast("T", self._value)

    def _settle(self) -> None:
        self.done = True
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()
