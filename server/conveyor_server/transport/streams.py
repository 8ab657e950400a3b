"""The streaming calls that are open, whatever transport they came over, and of whatever service.

Invariant: once the server drains, every stream is told so, those that still come included.
"""

import asyncio
from collections.abc import Mapping

from google.rpc import code_pb2, status_pb2

from conveyor_server import tracing
from conveyor_server.identity.caller import ANYBODY, Caller
from conveyor_server.identity.gate import Admitted, Gate
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.binding import Calls
from conveyor_server.transport.door import Guest
from conveyor_server.transport.echo import EchoCall
from conveyor_server.transport.ends import Lingering, Opener, Outlet
from conveyor_server.transport.guests import Guests
from conveyor_server.transport.intake import Intake
from conveyor_server.transport.pace import Paces
from conveyor_server.transport.stream import StreamCall

_ANYBODY = Guest({}, Admitted(ANYBODY), None)
# How long a stream that was sent away is listened to, until it half-closes.
_LINGER_S = 1.0
_FAILED = status_pb2.Status(code=code_pb2.INTERNAL)
# A stream that asks so is answered by the transport alone, where the server's settings allow it.
DIAGNOSTICS_KEY = "conveyor-diagnostics"


class Streams:
    """Core thread only.

    Args:
        core: what drives the sessions.
        metrics: what is counted.
        gate: that their clients have passed.
        diagnostics: streams may ask for an echo.
        messages_per_s: see pace.
        compiled: turns go to the compiled part first, see Intake.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        gate: Gate,
        *,
        diagnostics: bool,
        compiled: bool,
        messages_per_s: float = 0.0,
    ) -> None:
        self._core = core
        self._metrics = metrics
        self._diagnostics = diagnostics
        self._intake = Intake(core, metrics, use_compiled=compiled)
        core.before_turns(self._intake.take)
        # How fast each stream is read.
        self.paces = Paces(messages_per_s)
        # And their traces, where calls are traced.
        self._open: dict[Lingering, tracing.CallTrace | None] = {}
        self._guests = Guests(gate, lambda call: self._send_away(call, core.now() + _LINGER_S))
        self._none = asyncio.Event()
        self._none.set()
        # When the server stops, in the driver's seconds, once it drains.
        self._stops_at: float | None = None

    def __len__(self) -> int:
        """Calls that are open."""
        return len(self._open)

    def sessions(self, outlet: Outlet, metadata: Mapping[str, str], caller: Caller = ANYBODY) -> StreamCall | EchoCall:
        """An Opener: of SessionService.Stream."""
        if self._diagnostics and metadata.get(DIAGNOSTICS_KEY) == "echo":
            return EchoCall(outlet)
        return StreamCall(self._core, outlet, self._metrics, self._intake, caller)

    def enter(
        self,
        outlet: Outlet,
        opener: Opener | None = None,
        guest: Guest = _ANYBODY,
        method: str = "",
    ) -> Lingering:
        """A call begins.

        Args:
            outlet: where its messages go.
            opener: what serves it; None: `sessions`.
            guest: who it is from.
            method: `package.Service/Method`.
        """
        tracer = self._core.tracing
        trace = None if tracer is None else tracer.begin(method, guest.metadata)
        try:
            with tracing.within(trace):
                call = (opener or self.sessions)(outlet, guest.metadata, guest.admitted.caller)
        except Exception:
            if trace is not None:
                trace.end(_FAILED)
            raise
        self._open[call] = trace
        if guest.again is not None:
            self._guests.enter(call, guest.admitted, guest.again)
        self._metrics.streams = len(self._open)
        self._none.clear()
        if self._stops_at is not None:
            self._send_away(call, self._stops_at)
        return call

    def trace_of(self, call: Lingering) -> tracing.CallTrace | None:
        """The trace of a call that is open."""
        return self._open[call]

    def leave(self, call: Lingering, status: status_pb2.Status | None = None) -> None:
        """A call is gone: it ended with that status, or, None, by its client or with its connection."""
        trace = self._open.pop(call, None)
        if trace is not None:
            trace.end(status)
        self._guests.leave(call)
        self._metrics.streams = len(self._open)
        if not self._open:
            self._none.set()

    def go_away(self, stops_at: float) -> None:
        """Tells every stream, and those still to come, that the server stops."""
        self._stops_at = stops_at
        for call in list(self._open):
            self._send_away(call, stops_at)

    async def drain(self, calls: Calls, stops_at: float, now: float) -> bool:
        """Sends streams away and waits until they and the unary calls are done; False: time ran out."""
        self.go_away(stops_at)
        try:
            async with asyncio.timeout(max(0.0, stops_at - now)):
                await self._none.wait()
                await calls.idle()
        except TimeoutError:
            return False
        return True

    def _send_away(self, call: Lingering, stops_at: float) -> None:
        left_s = max(0.0, stops_at - self._core.now())
        call.go_away(left_s)
        asyncio.get_running_loop().call_later(min(_LINGER_S, left_s / 2), call.stop_lingering)
