"""The gRPC server on the completion queue: the fast transport. See `completion` for what it leans on.

Unary calls keep threads of their own; each hands its work to the core's loop and waits for it there.
"""

import asyncio
from collections.abc import Mapping
from concurrent import futures
from functools import partial

import grpc
from conveyor_proto.v1 import session_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import status_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from conveyor_server import compiled
from conveyor_server.identity.gate import Gate
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.binding import Calls, call_openers, openers, path_of, threaded_handlers, wording
from conveyor_server.transport.certificates import Tls
from conveyor_server.transport.completion import CompletionServer, Stream
from conveyor_server.transport.completion_loop import CompletionLoop
from conveyor_server.transport.door import Door
from conveyor_server.transport.ends import Opener, Served, TurnedAway
from conveyor_server.transport.health import Health
from conveyor_server.transport.port import WireOptions, channel_options, listen
from conveyor_server.transport.reflection import descriptors
from conveyor_server.transport.selftest import SelfTest
from conveyor_server.transport.streams import Streams

_SESSIONS = session_pb2.DESCRIPTOR.services_by_name["SessionService"]
# Unary calls that are under way at once; others wait for a thread.
_THREADS = 32


class CqServer:
    """The server and its port. Core thread only.

    Args:
        core: what drives the sessions.
        metrics: what is counted.
        servicers: by service; Stream joins SessionService, and a method that streams both ways is an Opener.
        gate: before every call but those of health and reflection.
        options: what the transport grants.
        loop: the one that runs.

    Raises:
        Unusable: this grpcio, or this machine, lacks something that is needed; nothing was bound.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        servicers: Mapping[ServiceDescriptor, object],
        *,
        gate: Gate,
        options: WireOptions,
        loop: CompletionLoop,
    ) -> None:
        self._loop = loop
        self._metrics = metrics
        self._threads = futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="unary")
        self._calls = Calls()
        self._open: set[Stream] = set()
        self._streams = Streams(
            core,
            metrics,
            gate,
            diagnostics=options.diagnostics,
            compiled=options.compiled and compiled.BUILT,
            messages_per_s=options.messages_per_s,
        )
        self._server = grpc.server(self._threads, options=channel_options(options))
        self._completion = CompletionServer(self._server, max_unsent_bytes=options.max_outgoing_bytes)
        # Before a port is bound, which would be taken when the other transport takes over.
        self._selftest = SelfTest(self._server, options.max_message_bytes)
        self._names = [service.full_name for service in servicers]
        for service, servicer in servicers.items():
            handlers = threaded_handlers(service, servicer, self._calls, metrics, gate=gate, core=core, loop=loop)
            streaming = {**openers(service, servicer), **call_openers(service, servicer)}
            if service is _SESSIONS:
                streaming["Stream"] = self._streams.sessions
            for name, opener in streaming.items():
                door = Door(gate, path_of(service, name), wording(servicer))
                handlers[name] = self._completion.handler(partial(self._arrived, opener, door))
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        self._health = Health(self._names)
        self._server.add_generic_rpc_handlers((self._health.completion_handlers(self._completion),))
        if options.reflection:
            services = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, self._server, pool=descriptors(servicers))

    def listen(self, host: str, port: int, tls: Tls | None) -> int:
        """Binds the port and returns it; see port.listen."""
        return listen(self._server, host, port, tls)

    async def start(self) -> None:
        """Takes calls from now on.

        Raises:
            Unusable: this grpcio does not work that way. Nothing of this server can be used then.
        """
        self._completion.start()
        self._loop.attach(self._completion)
        await asyncio.to_thread(self._selftest.run)

    async def say(self, *, serving: bool) -> None:
        """Tells health checks."""
        self._health.say(serving=serving)

    async def drain(self, stops_at: float, now: float) -> bool:
        """Sends streams away and waits until they and the unary calls are done; False: time ran out."""
        return await self._streams.drain(self._calls, stops_at, now)

    async def stop(self) -> None:
        """Ends what is left and lets go of the port."""
        await asyncio.to_thread(self._selftest.close)
        await asyncio.to_thread(self._completion.stop)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _arrived(self, opener: Opener, door: Door, stream: Stream) -> Served:
        guest = door.ask(stream.context)
        if isinstance(guest, status_pb2.Status):
            self._metrics.refused(guest)
            stream.fail(guest)
            return TurnedAway()
        call = self._streams.enter(stream, opener, guest, door.method)
        stream.pace = self._streams.paces.of(guest.admitted.caller)
        stream.trace = self._streams.trace_of(call)
        self._open.add(stream)
        self._look()

        def ended() -> None:
            self._streams.leave(call, stream.outcome)
            self._open.discard(stream)
            self._look()

        stream.ended = ended
        return call

    def _look(self) -> None:
        self._completion.lone = next(iter(self._open)) if len(self._open) == 1 else None
