"""The server of the completion queue: takes calls, and serves all that comes through the queue in turns.

Invariants: an event that is polled is taken; an exception in one event keeps no other from being served; a call is let
go once its last tag has come back.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # no types are published for it

from conveyor_server.incidents import record
from conveyor_server.tracing import within
from conveyor_server.transport.binding import incident_status
from conveyor_server.transport.completion.cork import WORTH_IT, Corks
from conveyor_server.transport.completion.internals import state_of
from conveyor_server.transport.completion.stream import Stream
from conveyor_server.transport.ends import Served
from conveyor_server.transport.selftest import SELFTEST_METHOD, Mirror

_ACCEPTS = 64
# A flood of events does not keep what has arrived from being run.
_MOST_EVENTS = 4096
# A look serves one socket, ready or not: one that finds nothing does not say that nothing is there. With one, batches
# of 256 streams had a mean of 33; with two, of 252.
_QUIET_LOOKS = 2
# Before a run that nobody is answered by, what is not found waits long: so it may be any of these sockets that has it.
_THOROUGH_LOOKS = 16
_TIMEOUT = cygrpc.CompletionType.queue_timeout


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

    Attributes:
        lone: the only stream there is. If it does not gather, a turn need not look for what follows its message.

    Raises:
        Unusable: this grpcio lacks something that is used of it.
    """

    def __init__(self, server: grpc.Server, *, max_unsent_bytes: int) -> None:
        self.max_unsent_bytes = max_unsent_bytes
        self.touched: list[Stream] = []
        self.condition = threading.Condition()
        self.stopped = False
        self.lone: Stream | None = None
        self._server = server
        self._inline = _Inline(1)
        self._corks = Corks()
        self._alarm_call: Any = None
        self._state = state_of(server)
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
            stream = Stream(self, rpc, call, context, self._corks.connection(context.peer()))
            try:
                stream.begin(arrived(stream))
            except Exception as error:  # as in Stream._received
                stream.fail(incident_status(error))
            # Streams are many and long: what is of no more use is not kept.
            stream.context = None

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

    def turn(self, timeout_s: float, run: Callable[[], None], *, thorough: bool = False) -> None:
        """Waits for an event at most that long, takes all that are there, then runs, then sends.

        Args:
            timeout_s: 0: looks only.
            run: called once everything that arrived was handed out.
            thorough: looks for longer.
        """
        # Names of this function's own are found faster than the module's, and this goes round for every event.
        poll, timeout, shutdown = self._queue.poll, _TIMEOUT, _server._SHUTDOWN_TAG
        # What a lone stream sent is all there is.
        most = 1 if self.lone is not None and not self.lone.gathers else _MOST_EVENTS
        event = poll(time.time() + timeout_s if timeout_s > 0 else 0)
        taken, quiet, looks = 0, 0, _THOROUGH_LOOKS if thorough else _QUIET_LOOKS
        while True:
            if event.completion_type == timeout:
                quiet += 1
                # The first look may have been spent on a socket that had nothing for us.
                if quiet == looks or not (taken or thorough):
                    break
            else:
                quiet = 0
                tag = event.tag
                try:
                    if tag is shutdown:
                        self._state.due.remove(tag)
                    else:
                        # Nothing, for a tag of ours; of grpcio's, a call that may be over.
                        done = tag(event)
                        if done is not None and done[0] is not None:
                            self._let_go(*done)
                except Exception as error:  # whatever one event does, the others are served
                    record("an event of the completion queue failed", error)
                taken += 1
                # Before the next is polled: an event that is polled is taken, or a stream waits for it forever.
                if taken == most:
                    break
            event = poll(0)
        # An event holds its call; what is gone must not be kept until the next.
        del event
        run()
        self._send()
        if self._state.stage is not _server._ServerStage.STARTED:
            self.stopped = bool(_server._stop_serving(self._state))

    def cancelled(self, rpc: Any) -> bool:
        """The client ended the call, or its connection did, before it was ended here."""
        return bool(rpc.client is _server._CANCELLED)

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

    def _send(self) -> None:
        """Begins what can be begun on the streams that this turn has touched."""
        touched, self.touched = self.touched, []
        if len(touched) < WORTH_IT:
            _advance(touched)
            return
        corked = self._corks.put_in([stream.connection for stream in touched if stream.has_more])
        _advance(touched)
        for connection in corked:
            connection.uncork()

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


def _advance(streams: Sequence[Stream]) -> None:
    for stream in streams:
        try:
            stream.advance()
        except Exception as error:  # as in Stream._received; the call's own end tells the rest
            with within(stream.trace):
                record("a stream failed", error)


def _woken(_: Any) -> None:
    """The alarm rang; the turn that it began is all that was wanted."""
