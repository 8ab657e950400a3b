"""Which transport serves: the one that fits the event loop that runs.

Invariant: `auto` never fails for want of the fast transport; it says in one line of the log why it took the other.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from google.protobuf.descriptor import ServiceDescriptor

from conveyor_server.errors import StartError
from conveyor_server.identity.gate import Gate
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.certificates import Tls
from conveyor_server.transport.grpc_aio import AioServer
from conveyor_server.transport.port import WireOptions

if TYPE_CHECKING:
    from conveyor_server.transport.completion_loop import CompletionLoop

Choice: TypeAlias = Literal["auto", "aio", "cq"]
_log = logging.getLogger("conveyor")


class Transport(Protocol):
    """A gRPC server of either kind. Core thread only."""

    def listen(self, host: str, port: int, tls: Tls | None) -> int:
        """Binds the port and returns it; see port.listen."""

    async def start(self) -> None:
        """Takes calls from now on."""

    async def say(self, *, serving: bool) -> None:
        """Tells health checks."""

    async def drain(self, stops_at: float, now: float) -> bool:
        """Sends streams away and waits until they and the unary calls are done; False: time ran out."""

    async def stop(self) -> None:
        """Ends what is left and lets go of the port."""


def run_with(choice: Choice, main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Runs a server's main on the loop of the chosen transport; returns what it returns.

    Args:
        choice: what the settings say.
        main: makes and runs the server; called again where `auto` has to take the other transport.

    Raises:
        StartError: `cq`, and it cannot be used here.
    """
    why = "it was chosen"
    if choice != "aio":
        try:
            # Here, because a grpcio that is too different may not even let itself be imported from.
            from conveyor_server.transport.completion_loop import CompletionLoop
            from conveyor_server.transport.selftest import Unusable
        except (ImportError, AttributeError) as error:
            why = f"this grpcio has other internals: {error}"
        else:
            try:
                with asyncio.Runner(loop_factory=CompletionLoop) as runner:
                    return runner.run(main())
            except Unusable as error:
                why = str(error)
        if choice == "cq":
            raise StartError(f"the transport cq cannot be used: {why}; take --transport aio, or another grpcio")
        _log.warning("transport auto: aio, because cq cannot be used: %s", why)
    return asyncio.run(main())


def open_transport(
    core: Core, metrics: Metrics, servicers: Mapping[ServiceDescriptor, object], gate: Gate, options: WireOptions
) -> Transport:
    """The transport of the loop that runs. Core thread only."""
    loop = _completion_loop()
    if loop is None:
        return AioServer(core, metrics, servicers, gate=gate, options=options)
    from conveyor_server.transport.grpc_cq import CqServer

    return CqServer(core, metrics, servicers, gate=gate, options=options, loop=loop)


def deferral() -> Callable[[Callable[[], None]], object]:
    """What puts a call off until all that arrived in this turn of the running loop is in."""
    loop = _completion_loop()
    return asyncio.get_running_loop().call_soon if loop is None else loop.defer


def after_sending() -> Callable[[Callable[[], None]], object] | None:
    """What puts a call off until what a turn of the running loop has to send is on its way; None: it has no turns."""
    loop = _completion_loop()
    return None if loop is None else loop.after_sending


def _completion_loop() -> "CompletionLoop | None":
    """The running loop, if it is the fast transport's."""
    # Its module is loaded if such a loop was made; elsewhere it may not even let itself be imported.
    module = sys.modules.get("conveyor_server.transport.completion_loop")
    loop = asyncio.get_running_loop()
    return loop if module is not None and isinstance(loop, module.CompletionLoop) else None
