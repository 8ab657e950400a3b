"""grpcio's completion queue, driven by the core's own thread: everything that leans on grpcio's internals is here.

The public `grpc.server` keeps the ports, unary calls and their threads, health, reflection, interceptors and
`stop(grace)`. What differs: no thread of grpcio's serves its queue, `turn` does; 64 accepts are posted instead of one,
so that streams that are opened by the thousand at once are all taken; and a Stream call, marked non-blocking as
grpcio's own health service marks `Watch`, never gets a thread: its reads and writes are tags of the same queue.

What is used beyond the public API: `Server._state` with `completion_queue`, `server`, `lock`, `rpc_states`, `due`,
`stage`, `thread_pool`, `generic_handlers` and `registered_method_handlers`; `_server._handle_call` with these
arguments; `_RequestIterator._state` and `._call`; `experimental_non_blocking` and `experimental_thread_pool` on a
behaviour; cygrpc's operations, `Call.start_server_batch`, `Server.request_call` and `request_registered_call`. TESTED
names the versions that the tests of this project have run on; on any version, the self-test decides.

Invariants: one send and one receive of a call are under way at most; an exception in a stream ends that stream only; a
call is let go once its last tag has come back.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, cast

import grpc
from google.rpc import status_pb2
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # no types are published for it

from conveyor_server.incidents import record
from conveyor_server.transport.binding import STATUS_DETAILS_KEY, incident_status
from conveyor_server.transport.ends import Served
from conveyor_server.transport.selftest import SELFTEST_METHOD, Mirror, Unusable

TESTED = ("1.85.1",)
_ACCEPTS = 64
# A flood of events does not keep what has arrived from being run.
_MOST_EVENTS = 4096
# A look serves one socket, ready or not: one that finds nothing does not say that nothing is there. With one, batches
# of 256 streams had a mean of 33; with two, of 252.
_QUIET_LOOKS = 2
_TIMEOUT = cygrpc.CompletionType.queue_timeout
# What is used of grpcio: looked for before anything is begun.
_OF_MODULE = (
    *("_SHUTDOWN_TAG", "_GenericMethod", "_RegisteredMethod", "_ServerStage", "_handle_call"),
    *("_is_rpc_state_active", "_on_call_completed", "_stop_serving"),
)
_OF_CYGRPC = (
    *("CompletionType", "ReceiveMessageOperation", "SendInitialMetadataOperation", "SendMessageOperation"),
    *("SendStatusFromServerOperation", "StatusCode"),
)
_OF_STATE = (
    *("active_rpc_count", "completion_queue", "due", "generic_handlers", "interceptor_pipeline", "lock"),
    *("registered_method_handlers", "rpc_states", "server", "stage", "thread_pool"),
)


_NO_METADATA: Mapping[str, str] = {}


class Stream:
    """One streaming call. See stream.Outlet. Core thread only.

    Attributes:
        call: grpcio's.
        metadata: what the client sent ahead, by lower-case key; empty once `arrived` has looked at it.
        ended: called once the call is gone, after `Served.broken`.
        unsent_bytes: of messages that were put and not taken by the transport.
    """

    __slots__ = (
        *("_closing", "_failure", "_greeted", "_held", "_max_unsent_bytes", "_next", "_queue", "_reading", "_receive"),
        *("_rpc", "_sending", "_served", "_server", "_statused", "_touched", "_wants"),
        *("call", "ended", "metadata", "unsent_bytes"),
    )

    def __init__(self, server: "CompletionServer", rpc: Any, call: Any, metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self.unsent_bytes = 0
        self.ended: Callable[[], None] | None = None
        self._server = server
        self._rpc = rpc
        self.call = call
        # To be sent: the next, and what is behind it, which is hardly ever anything.
        self._next: bytes | None = None
        self._queue: deque[bytes] | tuple[()] = ()
        # One for all messages: it holds no more than the message that is on its way.
        self._receive = (cygrpc.ReceiveMessageOperation(0),)
        self._max_unsent_bytes = server.max_unsent_bytes
        self._served: Served | None = None
        self._greeted = self._sending = self._reading = self._closing = self._touched = self._held = False
        self._statused = False
        self._wants = True
        self._failure: status_pb2.Status | None = None

    def begin(self, served: Served) -> None:
        """Reads messages for `served` from now on."""
        self._served = served
        self._rpc.callbacks.append(self._over)
        self._touch()

    def put(self, message: bytes) -> None:
        """Queues a message behind the others; after `close`, it is dropped."""
        if self._closing:
            return
        if self._next is None:
            self._next = message
        elif isinstance(self._queue, deque):
            self._queue.append(message)
        else:
            self._queue = deque((message,))
        self.unsent_bytes += len(message)
        if not self._touched:
            self._touch()

    def close(self) -> None:
        """Nothing follows; what is queued is still sent."""
        self._closing = True
        self._touch()

    def fail(self, status: status_pb2.Status) -> None:
        """Ends the call with that status; what is queued is not sent."""
        self._failure = self._failure or status
        self._next, self._queue = None, ()
        self.close()

    def advance(self) -> None:
        """Begins what can be begun: a send, the status, a receive; lets the call go once it is over."""
        self._touched = False
        if self._rpc is None:
            return
        if not self._statused:
            # A call that is over takes batches too; they just come back.
            if not self._sending and (self._next is not None or self._closing):
                self._begin(self._end() if self._next is None else self._send(self._next), self._sent)
                self._sending = True
            if self._wants and not self._reading and not self._statused and self.unsent_bytes <= self._max_unsent_bytes:
                self._begin(self._receive, self._received)
                self._reading = True
        if self._held and not self._reading and not self._sending:
            # Nothing of ours is under way: whatever ends the call from now on finds nothing to wait for.
            self._held = False
            self._rpc.due.discard(self)
            self._server.over(self._rpc)

    # ------------------------------------------------------------ tags

    def _received(self, _: Any) -> None:
        self._reading = False
        message = self._receive[0].message()
        served = self._served
        if served is not None:
            try:
                if message is None:
                    self._wants = False
                    served.half_close()
                else:
                    served.receive(message)
                    if served.eager:
                        self.advance()
            except Exception as error:  # a defect: logged whole, told by its id, and no other stream's business
                self.fail(incident_status(error))
        if not self._touched:
            self._touch()

    def _sent(self, _: Any) -> None:
        self._sending = False
        # Else the next message will: it has been waited for since before this was sent.
        if self._next is not None or self._closing or not self._reading:
            self._touch()

    # ------------------------------------------------------------ within

    def _send(self, message: bytes) -> Sequence[Any]:
        self._next = self._queue.popleft() if self._queue else None
        self.unsent_bytes -= len(message)
        operation = cygrpc.SendMessageOperation(message, 0)
        if self._greeted:
            return (operation,)
        self._greeted = True
        return (cygrpc.SendInitialMetadataOperation(None, 0), operation)

    def _end(self) -> Sequence[Any]:
        code, details, trailers = cygrpc.StatusCode.ok, b"", None
        if self._failure is not None:
            code, details = self._failure.code, self._failure.message.encode()
            trailers = ((STATUS_DETAILS_KEY, self._failure.SerializeToString()),)
        operations = [cygrpc.SendStatusFromServerOperation(trailers, code, details, 0)]
        if not self._greeted:
            operations.append(cygrpc.SendInitialMetadataOperation(None, 0))
        self._rpc.statused = self._statused = True
        return operations

    def _begin(self, operations: Sequence[Any], tag: Callable[[Any], Any]) -> None:
        if not self._held:
            # In the name of all that is under way: the call is not let go before.
            self._held = True
            self._rpc.due.add(self)
        error = self.call.start_server_batch(operations, tag)
        if error:
            if not self._reading and not self._sending:
                self._held = False
                self._rpc.due.discard(self)
            raise Unusable(f"a batch was refused with error {error}")

    def _touch(self) -> None:
        if not self._touched:
            self._touched = True
            self._server.touched.append(self)

    def _over(self) -> None:
        """The last of it has come back. Nothing may hold what is gone until the garbage collector comes round."""
        served, ended = self._served, self.ended
        self._rpc = self.call = self._served = self.ended = None
        if served is not None:
            served.broken()
        if ended is not None:
            ended()


class _Inline(futures.ThreadPoolExecutor):
    """Calls at once, on the core's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "futures.Future[Any]":
        done: futures.Future[Any] = futures.Future()
        done.set_result(fn(*args, **kwargs))
        return done


class CompletionServer:
    """A grpc.Server whose queue is served by `turn`. Core thread only, but for `alarm` and `stop`.

    Args:
        server: made by grpc.server and not started.
        max_unsent_bytes: a stream with more than this unsent reads no request.
    """

    def __init__(self, server: grpc.Server, *, max_unsent_bytes: int) -> None:
        self.max_unsent_bytes = max_unsent_bytes
        self.touched: list[Stream] = []
        self.stopped = False
        self._server = server
        self._inline = _Inline(1)
        self._alarm_call: Any = None
        self._state = cast(Any, getattr(server, "_state", None))
        for what, where, names in (
            ("grpc._server", _server, _OF_MODULE),
            ("cygrpc", cygrpc, _OF_CYGRPC),
            ("grpc.server's state", self._state, _OF_STATE),
        ):
            missing = [name for name in names if not hasattr(where, name)]
            if missing:
                raise Unusable(f"{what} of grpcio {grpc.__version__} has no {', '.join(missing)}")
        self._queue = self._state.completion_queue
        service, method = SELFTEST_METHOD
        handlers = {method: self.handler(self._answer_alarm)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def handler(self, arrived: Callable[[Stream], Served]) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method whose calls are streams of tags.

        Args:
            arrived: gets each call, and answers with what its messages are for.
        """

        def behaviour(requests: Any, context: Any, _send: Any) -> None:
            rpc, call = requests._state, requests._call
            metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
            stream = Stream(self, rpc, call, metadata)
            try:
                stream.begin(arrived(stream))
            except Exception as error:  # as in Stream._received
                stream.fail(incident_status(error))
            # Streams are many and long: what is of no more use is not kept.
            stream.metadata = _NO_METADATA

        behaviour.experimental_non_blocking = True  # type: ignore[attr-defined]
        behaviour.experimental_thread_pool = self._inline  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(behaviour)

    def start(self) -> None:
        """Takes calls from now on. As Server.start, without its thread."""
        state = self._state
        with state.lock:
            state.server.start()
            state.stage = _server._ServerStage.STARTED
            for _ in range(_ACCEPTS):
                self._accept(_Accept(self._accepted, None))
            # Generated code registers its methods with the core library, which then matches them itself.
            for method in state.registered_method_handlers:
                self._accept(_Accept(self._accepted, method))

    def turn(self, timeout_s: float, run: Callable[[], None]) -> None:
        """Waits for an event at most that long, takes all that are there, then runs, then sends.

        Args:
            timeout_s: 0: looks only.
            run: called once everything that arrived was handed out.
        """
        poll = self._queue.poll
        event = poll(time.time() + timeout_s if timeout_s > 0 else 0)
        taken, quiet = 0, 0
        while True:
            if event.completion_type == _TIMEOUT:
                quiet += 1
                # The first look may have been spent on a socket that had nothing for us.
                if quiet == _QUIET_LOOKS or not taken:
                    break
            else:
                quiet = 0
                try:
                    if event.tag is _server._SHUTDOWN_TAG:
                        self._state.due.remove(event.tag)
                    else:
                        # Nothing, for a tag of ours; of grpcio's, a call that may be over.
                        done = event.tag(event)
                        if done is not None and done[0] is not None:
                            self._let_go(*done)
                except Exception as error:  # whatever one event does, the others are served
                    record("an event of the completion queue failed", error)
                taken += 1
                # Before the next is polled: an event that is polled is taken, or a stream waits for it forever.
                if taken == _MOST_EVENTS:
                    break
            event = poll(0)
        # An event holds its call; what is gone must not be kept until the next.
        del event
        run()
        touched, self.touched = self.touched, []
        for stream in touched:
            try:
                stream.advance()
            except Exception as error:  # as in Stream._received; the call's own end tells the rest
                record("a stream failed", error)
        if self._state.stage is not _server._ServerStage.STARTED:
            self.stopped = bool(_server._stop_serving(self._state))

    def over(self, rpc: Any) -> None:
        """Nothing of a stream's is under way: if nothing else is, and the call has ended, it is let go."""
        if not rpc.due and not _server._is_rpc_state_active(rpc):
            callbacks, rpc.callbacks = rpc.callbacks, None
            self._let_go(rpc, callbacks or ())

    @property
    def can_be_woken(self) -> bool:
        """`alarm` has something to ring."""
        return self._alarm_call is not None

    def alarm(self) -> bool:
        """Wakes a `turn` that waits; False where nothing can. Any thread."""
        call = self._alarm_call
        return call is not None and call.start_server_batch((), _woken) == 0

    def stop(self) -> None:
        """Ends every call and lets go of the port. Another thread's; blocks while the core's turns."""
        self._alarm_call = None
        self._server.stop(None).wait()

    # ------------------------------------------------------------ within

    def _let_go(self, rpc: Any, callbacks: Sequence[Callable[[], None]]) -> None:
        self._state.rpc_states.discard(rpc)
        for callback in callbacks:
            try:
                callback()
            except Exception as error:  # the call is gone all the same, and the server can stop
                record("what follows the end of a call failed", error)

    def _accept(self, accept: "_Accept") -> None:
        state = self._state
        state.due.add(accept)
        if accept.method is None:
            state.server.request_call(state.completion_queue, state.completion_queue, accept)
        else:
            state.server.request_registered_call(state.completion_queue, state.completion_queue, accept.method, accept)

    def _accepted(self, accept: "_Accept", event: Any) -> None:
        state = self._state
        with state.lock:
            state.due.discard(accept)
            method: Any = _server._GenericMethod(state.generic_handlers)
            if accept.method is not None:
                method = _server._RegisteredMethod(accept.method, state.registered_method_handlers[accept.method])
            try:
                rpc, future = _server._handle_call(
                    event,
                    method,
                    state.interceptor_pipeline,
                    state.thread_pool,
                    False,
                )
                if rpc is not None:
                    state.rpc_states.add(rpc)
                if future is not None:
                    state.active_rpc_count += 1
                    future.add_done_callback(lambda _: _server._on_call_completed(state))
            finally:
                if state.stage is _server._ServerStage.STARTED:
                    self._accept(accept)

    def _answer_alarm(self, stream: Stream) -> Served:
        self._alarm_call = stream.call
        return Mirror(stream)


class _Accept:
    """One call that is waited for. Objects, because each needs its own place in the server's `due`.

    Attributes:
        method: that is registered with the core library; None: all others.
    """

    def __init__(self, accepted: Callable[["_Accept", Any], Any], method: str | None) -> None:
        self._accepted = accepted
        self.method = method

    def __call__(self, event: Any) -> Any:
        return self._accepted(self, event)


def _woken(_: Any) -> None:
    """The alarm rang; the turn that it began is all that was wanted."""
