"""grpc.health.v1, on either transport.

grpcio's own servicers do not do. The threaded one sends to its watchers while it holds a lock that a watcher's end
needs too, and each send waits for the thread that serves the queue: here that is the core's, which would wait for
itself. That of grpc.aio forgets everyone who watches a service once one of them has left (grpc/grpc#43403), and they
would take a server that drains for one that serves.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2

from conveyor_server.transport.completion import CompletionServer, Stream

_Request = health_pb2.HealthCheckRequest
_Status = health_pb2.HealthCheckResponse


class Health:
    """What health checks are told. Core thread only, but for `status`.

    Args:
        services: names that are known; "" is the server as a whole.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(("", *services), False)
        self._watchers: dict[Callable[[int], None], str] = {}

    def completion_handlers(self, server: CompletionServer) -> "grpc.GenericRpcHandler":
        """For grpc.Server.add_generic_rpc_handlers. Watch is a tag of the completion queue, as any stream."""
        watch = server.handler(lambda stream: _Watcher(self, stream))
        return self._handlers(self._check, watch)

    def aio_handlers(self) -> "grpc.GenericRpcHandler":
        """For grpc.aio.Server.add_generic_rpc_handlers."""
        watch: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
            self._watch, request_deserializer=_Request.FromString, response_serializer=_Status.SerializeToString
        )
        return self._handlers(self._check_aio, watch)

    def say(self, *, serving: bool) -> None:
        """Tells everyone who watches."""
        self._serving = dict.fromkeys(self._serving, serving)
        for tell, service in self._watchers.items():
            tell(self.status(service))

    def status(self, service: str) -> int:
        """SERVICE_UNKNOWN for a name that is not known. Any thread."""
        serving = self._serving.get(service)
        if serving is None:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if serving else _Status.NOT_SERVING

    def watch(self, tell: Callable[[int], None], service: str) -> None:
        """Tells a watcher now, and of every change."""
        self._watchers[tell] = service
        tell(self.status(service))

    def forget(self, tell: Callable[[int], None]) -> None:
        """The watcher is gone."""
        self._watchers.pop(tell, None)

    def _handlers(
        self, check: Callable[..., object], watch: "grpc.RpcMethodHandler[Any, Any]"
    ) -> "grpc.GenericRpcHandler":
        unary: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            check, request_deserializer=_Request.FromString, response_serializer=_Status.SerializeToString
        )
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": unary, "Watch": watch})

    def _check(self, request: _Request, context: grpc.ServicerContext) -> _Status:
        status = self.status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, _not_served(request.service))
        return _Status(status=status)

    async def _check_aio(self, request: _Request, context: "grpc.aio.ServicerContext[Any, Any]") -> _Status:
        status = self.status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, _not_served(request.service))
        return _Status(status=status)

    async def _watch(self, request: _Request, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        told: asyncio.Queue[int] = asyncio.Queue()
        self.watch(told.put_nowait, request.service)
        try:
            while True:
                await context.write(_Status(status=await told.get()))
        except grpc.aio.BaseError:
            return  # The client is gone; grpc.aio cancels this call, or has just not come to it.
        finally:
            self.forget(told.put_nowait)


def _not_served(service: str) -> str:
    return f"service {service!r} is not served here"


class _Watcher:
    """A Watch call on the completion queue; see ends.Served."""

    eager = gathers = False

    def __init__(self, board: Health, stream: Stream) -> None:
        self._board = board
        self._stream = stream

    def receive(self, data: bytes) -> None:
        """Takes the one request."""
        try:
            request = _Request.FromString(data)
        except DecodeError:
            self._stream.fail(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="no HealthCheckRequest"))
            return
        self._board.watch(self._tell, request.service)

    def half_close(self) -> None:
        """A watcher says no more than what it watches."""

    def broken(self) -> None:
        """The call is gone."""
        self._board.forget(self._tell)

    def _tell(self, status: int) -> None:
        self._stream.put(_Status(status=status).SerializeToString())
