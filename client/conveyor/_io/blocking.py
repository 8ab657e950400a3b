"""Threads: grpc's synchronous stack, with one reading thread per stream.

Measured against running the asyncio client on a background loop: a shorter ping-pong, and no second event loop in a
process that has one (grpc.aio's loops share one completion queue and disturb each other).
"""

import threading
import time
from collections.abc import AsyncIterable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor._io.base import (
    STREAM_METHOD,
    Incoming,
    Io,
    Metadata,
    NullSource,
    Outgoing,
    Runner,
    Signal,
    Source,
    Wire,
    drive,
)
from conveyor._io.channel import TLS, Option
from conveyor.errors import ConnectionLost, from_rpc_error

T = TypeVar("T")
R = TypeVar("R", bound=Message)


class BlockingSignal:
    """A lock that starts taken: the cheapest thing that one thread can wait for with a timeout, and Ctrl-C breaks."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if self._lock.locked():
            self._lock.release()

    async def wait(self, timeout_s: float | None) -> bool:
        taken = self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        if taken:
            self._lock.release()
        return taken


class BlockingRunner:
    """A thread that drives one coroutine."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._thread = threading.Thread(target=drive, args=(coroutine,), name="conveyor-link", daemon=True)
        self._thread.start()

    async def join(self, timeout_s: float | None) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class BlockingWire:
    """One stream.

    grpc writes from a thread of its own, which asks for messages when it can write one. It decodes what arrives in the
    thread that hears of it: there it is handled too, so that who waits for an answer is woken by that thread, and not
    by another one that had to be woken before.
    """

    def __init__(
        self, channel: grpc.Channel, target: str, metadata: Metadata, outgoing: Outgoing, incoming: Incoming
    ) -> None:
        self._target = target
        self._outgoing = outgoing
        self._incoming = incoming
        # Taken while there is nothing to write.
        self._door = threading.Lock()
        method = channel.stream_stream(
            STREAM_METHOD,
            request_serializer=pb.StreamRequest.SerializeToString,
            response_deserializer=self._arrived,
        )
        self._call = method(self._write(), metadata=tuple(metadata))

    def wake(self) -> None:
        if self._door.locked():
            self._door.release()

    def _write(self) -> Iterator[pb.StreamRequest]:
        while True:
            self._door.acquire()
            while requests := self._outgoing(self):
                yield from requests
            if requests is None:
                return

    def cancel(self) -> None:
        self._call.cancel()

    async def listen(self) -> NoReturn:
        try:
            while True:
                outcome = next(self._call)
                if isinstance(outcome, Exception):
                    raise outcome
        except StopIteration:
            raise ConnectionLost(f"{self._target} ended the stream", code=grpc.StatusCode.OK) from None
        except grpc.RpcError as error:
            raise _converted(error, f"stream to {self._target}") from None

    def _arrived(self, data: bytes) -> Exception | bool:
        """Handles a message. True, or what handling it raised: grpc takes no exception here but that it is none."""
        message = pb.StreamResponse.FromString(data)
        try:
            self._incoming(message)
        except Exception as error:
            return error
        return True

    async def close(self) -> None:
        self._call.cancel()
        # Ends grpc's writing thread.
        self.wake()


class BlockingIo:
    """Io with threads. Any thread may call."""

    def __init__(self, target: str, tls: TLS | None, options: Sequence[Option]) -> None:
        self.lock = threading.Lock()
        self.target = target
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=options)

    def now_s(self) -> float:
        return time.monotonic()

    def signal(self) -> Signal:
        return BlockingSignal()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Runner:
        return BlockingRunner(coroutine)

    def open_stream(self, metadata: Metadata, outgoing: Outgoing, incoming: Incoming) -> Wire:
        return BlockingWire(self._channel, self.target, metadata, outgoing, incoming)

    async def call(self, method: str, request: Message, response: type[R], timeout_s: float, metadata: Metadata) -> R:
        callable_ = self._channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        try:
            answer: R = callable_(request, timeout=timeout_s, metadata=tuple(metadata))
        except grpc.RpcError as error:
            raise _converted(error, f"{method.rpartition('/')[2]} on {self.target}") from None
        return answer

    def source(self, items: "Iterable[T] | AsyncIterable[T]") -> Source[T]:
        if not isinstance(items, Iterable):
            raise TypeError("stream takes an iterable; an asynchronous one needs conveyor.aio")
        return NullSource(items)

    async def close(self) -> None:
        self._channel.close()


def _converted(error: grpc.RpcError, what: str) -> Exception:
    # Every RpcError that a call raises is a grpc.Call too.
    call: Any = error
    return from_rpc_error(call.code(), call.details() or "", call.trailing_metadata(), what)


_: type[Io] = BlockingIo
