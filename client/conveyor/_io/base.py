"""The interface between the client's logic and whatever moves bytes, waits and runs things."""

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor._core.ticket import Ticket

T = TypeVar("T")
C_co = TypeVar("C_co", covariant=True)
R = TypeVar("R", bound=Message)
Metadata = Sequence[tuple[str, str]]
STREAM_METHOD = "/conveyor.v1.SessionService/Stream"


class Wire(Protocol):
    """One gRPC stream, from its opening to its end."""

    def wake(self) -> None:
        """There is something to write, or the stream is to be half-closed. Never waits; under the lock."""

    def cancel(self) -> None:
        """Ends it at once; `listen` raises. Not under the lock, which those who hold gRPC's own may wait for."""

    async def listen(self) -> NoReturn:
        """Hands on every message that comes, in order, until the end.

        Raises:
            ConveyorError: the stream has ended, in order (code OK) or not; or what handling a message raised.
        """

    async def close(self) -> None:
        """Frees what it holds, after the end or instead of it."""


# What a stream's writer writes next, asked without the lock: none, nothing before `wake`; None: half-close.
Outgoing = Callable[[Wire], Sequence[pb.StreamRequest] | None]
# Handles one message; takes the lock. Raises ConveyorError where the stream cannot be trusted any more.
Incoming = Callable[[pb.StreamResponse], None]


class Signal(Protocol):
    """Something that happens once, and one waiter."""

    def set(self) -> None:
        """It happened. May be called from any thread under the lock, and more than once."""

    async def wait(self, timeout_s: float | None) -> bool:
        """True once it has happened, False after `timeout_s`."""


class Runner(Protocol):
    """Something that runs beside its starter."""

    async def join(self, timeout_s: float | None) -> bool:
        """True once it has ended, False after `timeout_s`."""


class Source(Protocol[C_co]):
    """Items that come when they come."""

    async def pull(self, or_until: Ticket[Any] | None) -> tuple[C_co, ...] | None:
        """The next item in a tuple, an empty tuple at the end; None: `or_until` was settled first."""

    async def close(self) -> None:
        """Stops pulling."""


class Io(Protocol):
    """Threads or asyncio.

    Attributes:
        target: whom it talks to, for messages.
    """

    target: str

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Guards the cores; held for microseconds and never across an await."""

    def now_s(self) -> float:
        """A clock that does not go back."""

    def signal(self) -> Signal:
        """A fresh signal."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Runner:
        """Runs a coroutine beside the caller."""

    def open_stream(self, metadata: Metadata, outgoing: Outgoing, incoming: Incoming) -> Wire:
        """Begins a stream; whether the server is there is heard from `listen`. Under the lock."""

    async def call(self, method: str, request: Message, response: type[R], timeout_s: float, metadata: Metadata) -> R:
        """One unary call.

        Raises:
            ConveyorError: by the reason in the status, or by its code.
        """

    def source(self, items: "Iterable[T] | AsyncIterable[T]") -> Source[T]:
        """Pulls from an iterable; asyncio also from an asynchronous one."""

    async def close(self) -> None:
        """Closes the connection. All streams were closed before."""


class NullSource(Generic[T]):
    """Pulls from a plain iterable, in the caller's thread."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)

    async def pull(self, or_until: Ticket[Any] | None) -> tuple[T, ...] | None:  # noqa: ARG002
        for item in self._items:
            return (item,)
        return ()

    async def close(self) -> None:
        return


def drive(awaitable: Awaitable[T]) -> T:
    """Runs a coroutine whose primitives all block, to its end, without an event loop."""
    try:
        next(awaitable.__await__())
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise RuntimeError("a blocking coroutine was suspended: an asyncio primitive got into it")


def iterate(items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """An asynchronous generator whose primitives all block, as a plain one."""
    try:
        while True:
            try:
                item = drive(anext(items))
            except StopAsyncIteration:
                return
            yield item
    finally:
        drive(items.aclose())
