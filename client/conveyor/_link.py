"""A link keeps one stream open while anybody needs it, through every cut.

Invariant: the core is only touched inside `with link:`, which on leaving wakes the stream's writer where there is
something to write. One runner reads, from the first member until the client is closed or nobody needs a stream; another
one runs while something that was refused for now is to be asked for again.
"""

import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.member import Member
from conveyor._core.retry import RetryPolicy
from conveyor._core.stream import StreamCore
from conveyor._core.ticket import Ticket
from conveyor._io.base import Io, Metadata, Runner, Signal, Wire
from conveyor._trace import joined, of_caller
from conveyor.errors import ClientClosed, ConveyorError

# How long a server may take to end a stream that was half-closed, before it is cut.
_GOODBYE_S = 1.0


class Link:
    """One stream and its reconnections.

    Args:
        io: threads or asyncio.
        policy: how long a lost stream is tried again.
        headers: the metadata of a stream that is opened now, or raises ConveyorError; called without the lock.
    """

    def __init__(self, io: Io, policy: RetryPolicy, headers: Callable[[], Metadata] = tuple) -> None:
        self.core = StreamCore(policy)
        self._io = io
        self._headers = headers
        self._trace: Metadata = ()
        self._wire: Wire | None = None
        self._runner: Runner | None = None
        self._running = False
        # Set to cut a pause between two tries short.
        self._pausing: Signal | None = None
        self._retrier: Runner | None = None
        self._retrying = False
        # Set when the retrier has to look again before its time.
        self._dozing: Signal | None = None

    def __enter__(self) -> StreamCore:
        """Takes the lock."""
        self._io.lock.__enter__()
        return self.core

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Has written what is to be written, starts what is to be started, lets go of the lock."""
        try:
            if self.core.has_postponed:
                self._postpone()
            if self._wire is not None and self.core.has_outgoing:
                self._wire.wake()
            if not self._running and self.core.wanted:
                self._running = True
                # Here: the runner has no caller. Its streams are of the trace of whoever needed the first of them.
                self._trace = of_caller()
                self._runner = self._io.spawn(self._run())
        finally:
            self._io.lock.__exit__(kind, error, traceback)

    async def wait(self, ticket: Ticket[Any], timeout_s: float, member: Member | None = None) -> bool:
        """True once the ticket is settled; False after `timeout_s` with a connection.

        While the link is being resumed the time does not end: the resumption has a bound of its own. Nor does it where
        `member` was refused something for now, and asks again.
        """
        while not await self.settled(ticket, timeout_s):
            with self as core:
                if core.open and not core.finishing and (member is None or not core.retries(member)):
                    return ticket.done
                wire = self._wire if core.finishing else None
            if wire is not None:
                # The server said that it goes away, and stays: do not wait for its end.
                wire.cancel()
        return True

    def leave(self) -> list[Ticket[None]]:
        """Detaches from each session of which the server has not stored all; the tickets settle when it has."""
        with self as core:
            return core.leave_unstored()

    async def settled(self, ticket: Ticket[Any], timeout_s: float) -> bool:
        """True once the ticket is settled; False after `timeout_s`."""
        with self._io.lock:
            if ticket.done:
                return True
            signal = self._io.signal()
            ticket.when_done(signal.set)
        return await signal.wait(timeout_s)

    async def close(self) -> None:
        """Detaches everything that is still attached, ends the stream, and waits until nothing of it runs."""
        with self as core:
            core.close(ClientClosed("the client was closed"))
            wire, runner, retrier = self._wire, self._runner, self._retrier
            for signal in (self._pausing, self._dozing):
                if signal is not None:
                    signal.set()
        if retrier is not None:
            await retrier.join(None)
        if runner is None:
            return
        try:
            if wire is not None and await runner.join(_GOODBYE_S):
                return
        finally:
            if wire is not None:
                wire.cancel()
        await runner.join(None)

    # ------------------------------------------------------------ the runner

    async def _run(self) -> None:
        try:
            while True:
                with self as core:
                    if not core.wanted:
                        self._running = False
                        return
                error = await self._converse()
                with self as core:
                    delay_s = core.lost(error, self._io.now_s(), random.random())  # noqa: S311 - jitter, no secret
                    self._pausing = None if delay_s is None or core.closed else self._io.signal()
                if self._pausing is not None:
                    await self._pausing.wait(delay_s)
        except BaseException as error:
            # Also the end of the caller's event loop: nobody shall wait for a runner that is gone.
            with self as core:
                core.close(ClientClosed(f"the client's connection has ended: {error!r}"))
            raise

    def _postpone(self) -> None:
        """Plans when what was refused for now is asked for again. Under the lock."""
        self.core.schedule(self._io.now_s(), random.random())  # noqa: S311 - jitter, no secret
        if self._dozing is not None:
            self._dozing.set()
        if not self._retrying:
            self._retrying = True
            self._retrier = self._io.spawn(self._retry())

    async def _retry(self) -> None:
        """Asks for it again when it is time, until nothing is due."""
        while True:
            with self as core:
                delay_s = core.retry(self._io.now_s())
                self._dozing = dozing = None if delay_s is None else self._io.signal()
                self._retrying = dozing is not None
            if dozing is None:
                return
            await dozing.wait(delay_s)

    async def _converse(self) -> ConveyorError:
        """Opens a stream and reads it to its end, which is returned."""
        try:
            metadata = joined(self._headers(), self._trace)
        except ConveyorError as error:
            return error
        with self as core:
            if core.closed:
                return ClientClosed("the client was closed")
            wire = self._wire = self._io.open_stream(metadata, self._outgoing, self._incoming)
            core.opened()
        try:
            await wire.listen()
        except ConveyorError as error:
            return error
        finally:
            with self as core:
                self._wire = None
                core.open = False
            await wire.close()

    def _incoming(self, message: pb.StreamResponse) -> None:
        with self as core:
            core.receive(message)

    def _outgoing(self, wire: Wire) -> Sequence[pb.StreamRequest] | None:
        """What a stream's writer writes next: none, nothing yet; None: half-close."""
        with self._io.lock:
            core = self.core
            if wire is not self._wire:
                # It was lost, and what there is to say is said to its successor.
                return None
            outgoing = core.take_outgoing()
            return None if not outgoing and (core.finishing or core.closed) else outgoing
