"""asyncio: grpc.aio, with one reading and one writing task per stream. Everything belongs to one event loop."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor._core.ticket import Ticket
from conveyor._io.alarms import Alarms
from conveyor._io.base import STREAM_METHOD, Incoming, Io, Metadata, NullSource, Outgoing, Runner, Signal, Source, Wire
from conveyor._io.channel import TLS, Option
from conveyor.errors import ConnectionLost, ConveyorError, from_rpc_error

# How long one stream may keep the loop to itself while its items are there at once.
_TURN_S = 0.0001

T = TypeVar("T")
R = TypeVar("R", bound=Message)


class AsyncSignal:
    """A future that says whether it happened (True) or took too long (False)."""

    __slots__ = ("_alarms", "future")

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self.future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self.future.done():
            self.future.set_result(True)

    async def wait(self, timeout_s: float | None) -> bool:
        if timeout_s is None:
            return await self.future
        self._alarms.set(self.future, timeout_s)
        try:
            return await self.future
        finally:
            self._alarms.drop(self.future)


class AsyncRunner:
    """A task."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(coroutine, name="conveyor-link")

    async def join(self, timeout_s: float | None) -> bool:
        done, _ = await asyncio.wait((self._task,), timeout=timeout_s)
        return bool(done)


class AsyncWire:
    """One stream. grpc.aio takes one write at a time, so one task writes, and asks for messages when it can write."""

    def __init__(
        self, channel: grpc.aio.Channel, target: str, metadata: Metadata, outgoing: Outgoing, incoming: Incoming
    ) -> None:
        self._target = target
        self._outgoing = outgoing
        self._incoming = incoming
        method = channel.stream_stream(
            STREAM_METHOD,
            request_serializer=pb.StreamRequest.SerializeToString,
            response_deserializer=pb.StreamResponse.FromString,
        )
        self._call: Any = method(metadata=tuple(metadata))
        # What the writer waits for while there is nothing to write.
        self._idle: asyncio.Future[None] | None = None
        self._writer = asyncio.get_running_loop().create_task(self._write(), name="conveyor-write")

    def wake(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def cancel(self) -> None:
        self._call.cancel()

    async def listen(self) -> NoReturn:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._incoming(message)
        except grpc.aio.AioRpcError as error:
            raise _converted(error, f"stream to {self._target}") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio answers so to its own cancel().
            raise ConnectionLost("the stream was cancelled", code=grpc.StatusCode.CANCELLED) from None
        raise ConnectionLost(f"{self._target} ended the stream", code=grpc.StatusCode.OK)

    async def close(self) -> None:
        self._call.cancel()
        self._writer.cancel()
        await asyncio.wait((self._writer,))

    async def _write(self) -> None:
        try:
            while (requests := self._outgoing(self)) is not None:
                for request in requests:
                    await self._call.write(request)
                if not requests:
                    self._idle = asyncio.get_running_loop().create_future()
                    await self._idle
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream has ended; the reader hears how.
            return


class AsyncSource(Generic[T]):
    """Pulls from an asynchronous iterable, and meanwhile lets an answer come first."""

    def __init__(self, items: AsyncIterable[T]) -> None:
        self._items: AsyncIterator[T] = aiter(items)
        self._pulling: asyncio.Task[tuple[T, ...]] | None = None

    async def pull(self, or_until: Ticket[Any] | None) -> tuple[T, ...] | None:
        if self._pulling is None:
            self._pulling = asyncio.get_running_loop().create_task(self._next(), name="conveyor-pull")
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle() -> None:
            if not settled.done():
                settled.set_result(None)

        if or_until is not None:
            or_until.when_done(settle)
        await asyncio.wait((self._pulling, settled), return_when=asyncio.FIRST_COMPLETED)
        if not self._pulling.done():
            return None
        pulled, self._pulling = self._pulling, None
        return pulled.result()

    async def close(self) -> None:
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.wait((self._pulling,))

    async def _next(self) -> tuple[T, ...]:
        try:
            return (await anext(self._items),)
        except StopAsyncIteration:
            return ()


class YieldingSource(NullSource[T]):
    """Pulls from a plain iterable, and lets the loop send and receive meanwhile.

    Before each item where items take their time; but not before each of many that are there at once, for a turn of the
    loop costs more than a step.
    """

    def __init__(self, items: Iterable[T]) -> None:
        super().__init__(items)
        self._turned_s = 0.0

    async def pull(self, or_until: Ticket[Any] | None) -> tuple[T, ...] | None:
        if time.perf_counter() - self._turned_s > _TURN_S:
            await asyncio.sleep(0)
            self._turned_s = time.perf_counter()
        return await super().pull(or_until)


class AsyncIo:
    """Io with asyncio. The loop of the first call is the loop of all calls."""

    def __init__(self, target: str, tls: TLS | None, options: Sequence[Option]) -> None:
        self.lock = nullcontext()
        self._alarms = Alarms()
        self.target = target
        self._tls = tls
        self._options = options
        self._opened: grpc.aio.Channel | None = None

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Made on first use: a channel belongs to the loop that runs while it is made.
        if self._opened is None:
            if self._tls is None:
                self._opened = grpc.aio.insecure_channel(self.target, options=self._options)
            else:
                self._opened = grpc.aio.secure_channel(self.target, self._tls.credentials(), options=self._options)
        return self._opened

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def signal(self) -> Signal:
        return AsyncSignal(self._alarms)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Runner:
        return AsyncRunner(coroutine)

    def open_stream(self, metadata: Metadata, outgoing: Outgoing, incoming: Incoming) -> Wire:
        return AsyncWire(self._channel, self.target, metadata, outgoing, incoming)

    async def call(self, method: str, request: Message, response: type[R], timeout_s: float, metadata: Metadata) -> R:
        callable_ = self._channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        call: Any = callable_(request, timeout=timeout_s, metadata=tuple(metadata))
        try:
            answer: R = await call
        except grpc.aio.AioRpcError as error:
            raise _converted(error, f"{method.rpartition('/')[2]} on {self.target}") from None
        finally:
            # An abandoned call would stay with the channel.
            call.cancel()
        return answer

    def source(self, items: "Iterable[T] | AsyncIterable[T]") -> Source[T]:
        if isinstance(items, AsyncIterable):
            return AsyncSource(items)
        return YieldingSource(items)

    async def close(self) -> None:
        self._alarms.close()
        if self._opened is not None:
            await self._opened.close()


def _converted(error: grpc.aio.AioRpcError, what: str) -> ConveyorError:
    return from_rpc_error(error.code(), error.details() or "", error.trailing_metadata(), what)


_: type[Io] = AsyncIo
