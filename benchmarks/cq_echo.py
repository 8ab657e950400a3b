"""The bare echo on grpcio's completion queue: as fast as grpcio moves messages in one thread, with nothing of Conveyor.

It shares no code with the server's transport, so that a slow loop there shows as a ratio to this one. It leans on the
same internals of grpcio. As in aio_echo, the echo of a request reads as its answer.
"""

import os

# As the server has it. Read when gRPC is first imported: the thread at the queue does the sockets' work itself.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
from grpc import _server as _grpc_server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # no types are published for it

_server: Any = _grpc_server
_SERVICE = "conveyor.v1.SessionService"
# With one call accepted at a time, streams that are opened under load wait for each other.
_ACCEPTS = 64
# A look may serve a socket that has nothing whole yet. With one, turns are short and many.
_QUIET_LOOKS = 2
_TIMEOUT = cygrpc.CompletionType.queue_timeout
_NOTHING: tuple[None, tuple[()]] = (None, ())


class _Inline(futures.ThreadPoolExecutor):
    """Calls at once, in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "futures.Future[Any]":
        done: futures.Future[Any] = futures.Future()
        done.set_result(fn(*args, **kwargs))
        return done


class _Stream:
    """One call; the tag of all its batches.

    Args:
        state: grpcio's own of the call.
        call: its batches are started here.
        arrived: gets the stream and each message.
    """

    def __init__(self, state: Any, call: Any, arrived: "Callable[[_Stream, bytes], None]") -> None:
        self._state = state
        self._call = call
        self._arrived = arrived
        self._receive = cygrpc.ReceiveMessageOperation(0)
        self._opening: tuple[Any, ...] = (cygrpc.SendInitialMetadataOperation(None, 0),)
        state.due.add(self)
        call.start_server_batch((self._receive,), self)

    def __call__(self, event: Any) -> tuple[None, tuple[()]]:
        """A batch is done: its last operation was the next message."""
        message = event.batch_operations[-1].message()
        if message is None:
            self._end()
        else:
            self._arrived(self, message)
        return _NOTHING

    def answer(self, message: bytes) -> None:
        """Sends it back, and waits for the next."""
        operations = (*self._opening, cygrpc.SendMessageOperation(message, 0), self._receive)
        self._opening = ()
        self._call.start_server_batch(operations, self)

    def _end(self) -> None:
        state = self._state
        state.due.discard(self)
        if state.client is _server._CANCELLED:
            return
        state.statused = True
        token = object()
        state.due.add(token)
        operations = (*self._opening, cygrpc.SendStatusFromServerOperation(None, 0, b"", 0))
        tag = _server._send_status_from_server(state, token)
        self._call.start_server_batch(operations, tag)


class Echo:
    """A grpc.Server whose queue is served by the caller of `serve`."""

    def __init__(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(1), options=(("grpc.so_reuseport", 0),))
        self._arrived: list[tuple[_Stream, bytes]] = []

        def behaviour(requests: Any, _context: Any, _send: Any) -> None:
            _Stream(requests._state, requests._call, lambda stream, message: self._arrived.append((stream, message)))

        behaviour.experimental_non_blocking = True  # type: ignore[attr-defined]
        behaviour.experimental_thread_pool = _Inline(1)  # type: ignore[attr-defined]
        handlers: dict[str, Any] = {"Stream": grpc.stream_stream_rpc_method_handler(behaviour)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._state: Any = self._server._state  # type: ignore[attr-defined]

    def serve(self) -> None:
        """Answers until the process is ended."""
        state = self._state
        with state.lock:
            state.server.start()
            state.stage = _server._ServerStage.STARTED
            for _ in range(_ACCEPTS):
                self._accept(_Accept(self._accepted))
        while True:
            self._turn()

    def _turn(self) -> None:
        """Takes all that is there, then answers it: many messages of a connection go out together."""
        poll, rpc_states = self._state.completion_queue.poll, self._state.rpc_states
        event = poll(time.time() + 1.0)
        quiet = 0
        while True:
            if event.completion_type == _TIMEOUT:
                quiet += 1
                if quiet == _QUIET_LOOKS:
                    break
            else:
                quiet = 0
                ended, callbacks = event.tag(event)
                for callback in callbacks:
                    callback()
                if ended is not None:
                    rpc_states.discard(ended)
            event = poll(0)
        arrived, self._arrived = self._arrived, []
        for stream, message in arrived:
            stream.answer(message)

    def _accept(self, accept: "_Accept") -> None:
        queue = self._state.completion_queue
        self._state.server.request_call(queue, queue, accept)

    def _accepted(self, accept: "_Accept", event: Any) -> tuple[None, tuple[()]]:
        state = self._state
        with state.lock:
            method = _server._GenericMethod(state.generic_handlers)
            rpc, _ = _server._handle_call(event, method, None, state.thread_pool, False)
            if rpc is not None:
                state.rpc_states.add(rpc)
            self._accept(accept)
        return _NOTHING


class _Accept:
    """One call that is waited for."""

    def __init__(self, accepted: "Callable[[_Accept, Any], tuple[None, tuple[()]]]") -> None:
        self._accepted = accepted

    def __call__(self, event: Any) -> tuple[None, tuple[()]]:
        return self._accepted(self, event)


def main() -> None:
    """Serves until the process is ended; prints its port."""
    echo = Echo()
    print(echo.port, flush=True)
    echo.serve()


if __name__ == "__main__":
    main()
