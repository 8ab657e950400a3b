"""grpc.health.v1 on the completion queue.

grpcio's own servicer sends to its watchers while it holds a lock that a watcher's end needs too, and each send waits
for the thread that serves the queue: here that is the core's, which would wait for itself. So Watch is a tag as any
stream.
"""

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2

from conveyor_server.transport.completion import CompletionServer, Stream

_Status = health_pb2.HealthCheckResponse


class Health:
    """What health checks are told. Core thread only, but for `Check`.

    Args:
        server: where it joins in.
        services: names that are known; "" is the server as a whole.
    """

    def __init__(self, server: CompletionServer, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(("", *services), False)
        self._watchers: dict[_Watcher, str] = {}
        self._server = server

    def handlers(self) -> "grpc.GenericRpcHandler":
        """For grpc.Server.add_generic_rpc_handlers."""
        check: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=_Status.SerializeToString,
        )
        methods = {"Check": check, "Watch": self._server.handler(lambda stream: _Watcher(self, stream))}
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    def say(self, *, serving: bool) -> None:
        """Tells everyone who watches."""
        self._serving = dict.fromkeys(self._serving, serving)
        for watcher, service in self._watchers.items():
            watcher.tell(self.status(service))

    def status(self, service: str) -> int:
        """SERVICE_UNKNOWN for a name that is not known. Any thread."""
        serving = self._serving.get(service)
        if serving is None:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if serving else _Status.NOT_SERVING

    def watch(self, watcher: "_Watcher", service: str) -> None:
        """Tells a watcher now, and of every change."""
        self._watchers[watcher] = service
        watcher.tell(self.status(service))

    def forget(self, watcher: "_Watcher") -> None:
        """The watcher is gone."""
        self._watchers.pop(watcher, None)

    def _check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> _Status:
        status = self.status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is not served here")
        return _Status(status=status)


class _Watcher:
    """A Watch call; see ends.Served."""

    eager = gathers = False

    def __init__(self, board: Health, stream: Stream) -> None:
        self._board = board
        self._stream = stream

    def receive(self, data: bytes) -> None:
        """Takes the one request."""
        try:
            request = health_pb2.HealthCheckRequest.FromString(data)
        except DecodeError:
            self._stream.fail(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="no HealthCheckRequest"))
            return
        self._board.watch(self, request.service)

    def tell(self, status: int) -> None:
        """Sends a status."""
        self._stream.put(_Status(status=status).SerializeToString())

    def half_close(self) -> None:
        """A watcher says no more than what it watches."""

    def broken(self) -> None:
        """The call is gone."""
        self._board.forget(self)
