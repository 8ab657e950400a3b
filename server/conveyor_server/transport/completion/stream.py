"""One streaming call as tags of the completion queue.

Invariants: one send and one receive are under way at most; nothing of the call's is, or it is in the call's `due`; an
exception in what is served ends this stream only.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from google.rpc import status_pb2
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # no types are published for it

from conveyor_server.tracing import OK, CallTrace, within
from conveyor_server.transport.binding import STATUS_DETAILS_KEY, incident_status
from conveyor_server.transport.completion.cork import Connection
from conveyor_server.transport.ends import Served
from conveyor_server.transport.pace import Pace
from conveyor_server.transport.selftest import Unusable


class Home(Protocol):
    """The server whose call it is. Core thread only.

    Attributes:
        touched: streams that are to be advanced at the end of this turn.
        max_unsent_bytes: a stream with more than this unsent reads no request.
        condition: of all calls.
    """

    touched: list["Stream"]
    max_unsent_bytes: int
    condition: threading.Condition

    def cancelled(self, rpc: Any) -> bool:
        """The client ended the call, or its connection did, before it was ended here."""

    def over(self, rpc: Any) -> None:
        """Nothing of the stream's is under way: if nothing else is, and the call has ended, it is let go."""


class Stream:
    """One streaming call. See stream.Outlet. Core thread only.

    Attributes:
        call: grpcio's.
        connection: that it came over.
        context: of the call, for who serves it; None once `arrived` has looked at it.
        pace: how fast it is read; None: as fast as messages come.
        ended: called once the call is gone, after `Served.broken`.
        unsent_bytes: of messages that were put and not taken by the transport.
        trace: of the call, where calls are traced.
    """

    __slots__ = (
        *(
            "_cancelled",
            "_closing",
            "_failure",
            "_greeted",
            "_held",
            "_max_unsent_bytes",
            "_next",
            "_queue",
            "_reading",
            "_receive",
        ),
        *("_resting", "_rpc", "_sending", "_served", "_server", "_statused", "_touched", "_wants"),
        *("call", "connection", "context", "ended", "pace", "trace", "unsent_bytes"),
    )

    def __init__(self, server: "Home", rpc: Any, call: Any, context: Any, connection: Connection) -> None:
        self.context = context
        self.connection = connection
        self.unsent_bytes = 0
        self.ended: Callable[[], None] | None = None
        self.pace: Pace | None = None
        self.trace: CallTrace | None = None
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
        # It was read too fast, and is read again later.
        self._statused = self._cancelled = self._resting = False
        self._wants = True
        self._failure: status_pb2.Status | None = None

    def begin(self, served: Served) -> None:
        """Reads messages for `served` from now on."""
        self._served = served
        self._rpc.callbacks.append(self._over)
        self._touch()

    @property
    def gathers(self) -> bool:
        """What follows its messages belongs into the same run."""
        return self._served is None or self._served.gathers

    @property
    def outcome(self) -> status_pb2.Status | None:
        """How the call was ended here; None: it was not, but by its client or with its connection."""
        return (self._failure or OK) if self._statused and not self._cancelled else None

    @property
    def has_more(self) -> bool:
        """A message is to be sent."""
        return self._next is not None

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

    def close(self, status: status_pb2.Status | None = None) -> None:
        """Nothing follows; what is queued is still sent, and the call ends with that status, or well."""
        self._failure = self._failure or status
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
                operations: Sequence[Any] = () if self._next is None else self._send(self._next)
                if self._next is None and self._closing:
                    # With the last message, or after it.
                    operations = (*operations, *self._end())
                self._begin(operations, self._sent)
                self._sending = True
            idle = self._wants and not self._reading and not self._statused and not self._resting
            if idle and self.unsent_bytes <= self._max_unsent_bytes:
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
        if self.pace is not None and message is not None and (wait_s := self.pace.take(time.monotonic())):
            self._rest(wait_s)
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
                with within(self.trace):
                    self.fail(incident_status(error))
        if not self._touched:
            self._touch()

    def _sent(self, _: Any) -> None:
        self._sending = False
        if self._next is not None:
            # Not at the end of the turn: many answers of one stream would take a turn each.
            self.advance()
        elif self._closing or not self._reading:
            # Else the next message will: it has been waited for since before this was sent.
            self._touch()

    # ------------------------------------------------------------ within

    def _send(self, message: bytes) -> Sequence[Any]:
        self._next = None
        if self._queue:
            self._next = self._queue.popleft()
            # Streams are many, and an empty deque takes 700 bytes.
            self._queue = self._queue or ()
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
            # Nobody waits at a call that is tags, and a condition of its own takes a kilobyte.
            self._rpc.condition = self._server.condition
        error = self.call.start_server_batch(operations, tag)
        if error:
            if not self._reading and not self._sending:
                self._held = False
                self._rpc.due.discard(self)
            raise Unusable(f"a batch was refused with error {error}")

    def _rest(self, wait_s: float) -> None:
        """Reads nothing for so long."""

        def wake() -> None:
            self._resting = False
            if self._rpc is not None:
                self._touch()

        self._resting = True
        asyncio.get_running_loop().call_later(wait_s, wake)

    def _touch(self) -> None:
        if not self._touched:
            self._touched = True
            self._server.touched.append(self)

    def _over(self) -> None:
        """The last of it has come back. Nothing may hold what is gone until the garbage collector comes round."""
        served, ended = self._served, self.ended
        self._cancelled = self._server.cancelled(self._rpc)
        self._rpc = self.call = self._served = self.ended = None
        if served is not None:
            served.broken()
        if ended is not None:
            ended()
