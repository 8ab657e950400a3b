"""The gRPC server on asyncio, public API only.

What grpc.aio does not tell apart: a client that was killed, a deadline and the end of the grace period all look like a
cancelled call, and sometimes like the normal end of the requests. So the end of requests only ever detaches, a session
is closed by a message alone, and a stream that ended in order says so with StreamEnd.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc
import grpc.aio
from conveyor_proto.v1 import session_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import status_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from conveyor_server import compiled, tracing
from conveyor_server.identity.gate import Gate
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.binding import Calls, abort, incident_status, openers, path_of, unary_handlers, wording
from conveyor_server.transport.certificates import Tls
from conveyor_server.transport.door import Door
from conveyor_server.transport.ends import Opener, Served
from conveyor_server.transport.health import Health
from conveyor_server.transport.outbox import Outbox, StreamFailed
from conveyor_server.transport.pace import Pace
from conveyor_server.transport.port import WireOptions, channel_options, listen
from conveyor_server.transport.reflection import descriptors
from conveyor_server.transport.streams import Streams

# What was answered just now is still on its way through grpc.aio, and would be cut off with its call.
_LAST_WORDS_S = 0.2
_SESSIONS = session_pb2.DESCRIPTOR.services_by_name["SessionService"]


class AioServer:
    """The server and its port. Core thread only.

    Args:
        core: what drives the sessions.
        metrics: what is counted.
        servicers: by service; Stream joins SessionService, and a method that streams both ways is an Opener.
        gate: before every call but those of health and reflection.
        options: what the transport grants.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        servicers: Mapping[ServiceDescriptor, object],
        *,
        gate: Gate,
        options: WireOptions,
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._calls = Calls()
        self._streams = Streams(
            core,
            metrics,
            gate,
            diagnostics=options.diagnostics,
            compiled=options.compiled and compiled.BUILT,
            messages_per_s=options.messages_per_s,
        )
        self._server = grpc.aio.server(options=channel_options(options))
        for service, servicer in servicers.items():
            handlers = unary_handlers(service, servicer, self._calls, metrics, gate=gate, core=core)
            streaming = openers(service, servicer)
            if service is _SESSIONS:
                streaming["Stream"] = self._streams.sessions
            for name, opener in streaming.items():
                door = Door(gate, path_of(service, name), wording(servicer))
                handlers[name] = grpc.stream_stream_rpc_method_handler(partial(self._serve, opener, door))
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        self._names = [service.full_name for service in servicers]
        self._health = Health(self._names)
        self._server.add_generic_rpc_handlers((self._health.aio_handlers(),))
        if options.reflection:
            services = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, self._server, pool=descriptors(servicers))

    def listen(self, host: str, port: int, tls: Tls | None) -> int:
        """Binds the port and returns it; see port.listen."""
        return listen(self._server, host, port, tls)

    async def start(self) -> None:
        """Takes calls from now on."""
        await self._server.start()

    async def say(self, *, serving: bool) -> None:
        """Tells health checks."""
        self._health.say(serving=serving)

    async def drain(self, stops_at: float, now: float) -> bool:
        """Sends streams away and waits until they and the unary calls are done; False: time ran out."""
        return await self._streams.drain(self._calls, stops_at, now)

    async def stop(self) -> None:
        """Ends what is left and lets go of the port."""
        await self._server.stop(_LAST_WORDS_S)

    async def _serve(
        self, opener: Opener, door: Door, _: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Serves one streaming call. Requests are read beside, answers written here: the call ends with the last."""
        outbox = Outbox(self._options.max_outgoing_bytes)
        guest = door.ask(context)
        if isinstance(guest, status_pb2.Status):
            self._metrics.refused(guest)
            await abort(context, guest)
            return
        try:
            call = self._streams.enter(outbox, opener, guest, door.method)
        except Exception as error:  # as below
            await abort(context, incident_status(error))
            return
        pace = self._streams.paces.of(guest.admitted.caller)
        # This task's and the reader's: what they log is of this call.
        tracing.enter(self._streams.trace_of(call))
        reader = asyncio.create_task(_read(context, call, outbox, pace))
        status: status_pb2.Status | None = None
        try:
            while (message := await outbox.take()) is not None:
                await context.write(message)
            status = tracing.OK
        except grpc.aio.BaseError:
            # The client is gone; grpc.aio cancels this call, or has just not come to it.
            return
        except StreamFailed as failure:
            status = failure.status
            await abort(context, status)
        except Exception as error:  # a defect: logged whole, told by its id
            status = incident_status(error)
            await abort(context, status)
        finally:
            call.broken()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            self._streams.leave(call, status)


async def _read(context: "grpc.aio.ServicerContext[Any, Any]", call: Served, outbox: Outbox, pace: Pace | None) -> None:
    try:
        while True:
            await outbox.room()
            request = await context.read()
            if request is grpc.aio.EOF:
                call.half_close()
                return
            call.receive(request)
            if pace is not None and (wait_s := pace.take(time.monotonic())):
                await asyncio.sleep(wait_s)
    except grpc.aio.BaseError:
        call.half_close()
    except Exception as error:  # told to the writer, which ends the call
        outbox.fail(incident_status(error))
