"""The gRPC server on asyncio, public API only.

What grpc.aio does not tell apart: a client that was killed, a deadline and the end of the grace period all look like a
cancelled call, and sometimes like the normal end of the requests. So the end of requests only ever detaches, a session
is closed by a message alone, and a stream that ended in order says so with StreamEnd.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import StartError
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.binding import Calls, abort, incident_status
from conveyor_server.transport.outbox import Outbox
from conveyor_server.transport.stream import StreamCall


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for a secure port.

    Attributes:
        certificate, key: PEM, the chain and its private key.
        client_ca: PEM; clients must show a certificate that it signed. None: any client.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds of the transport.

    Attributes:
        max_message_bytes: of one request; a larger one ends its call with RESOURCE_EXHAUSTED, and sessions live on.
        max_outgoing_bytes: a stream with more than this unsent reads no request.
    """

    max_message_bytes: int = 16 << 20
    max_outgoing_bytes: int = 4 << 20


# How long a stream that was sent away is listened to, until it half-closes.
_LINGER_S = 1.0


class Streams:
    """The Stream calls that are open. Core thread only."""

    def __init__(self, core: Core, metrics: Metrics, limits: WireLimits) -> None:
        self._core = core
        self._metrics = metrics
        self._limits = limits
        self._open: set[StreamCall] = set()
        self._none = asyncio.Event()
        self._none.set()
        # When the server stops, in the driver's seconds, once it drains.
        self._stops_at: float | None = None

    async def serve(self, _: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Serves one Stream call. Requests are read beside, answers written here: the call ends with the last."""
        outbox = Outbox(self._limits.max_outgoing_bytes)
        call = StreamCall(self._core, outbox, self._metrics)
        self._enter(call)
        reader = asyncio.create_task(_read(context, call, outbox))
        try:
            while (outgoing := await outbox.take()) is not None:
                await context.write(outgoing.data)
                if outgoing.written is not None:
                    outgoing.written()
        except grpc.aio.BaseError:
            # The client is gone; grpc.aio cancels this call, or has just not come to it.
            return
        except Exception as error:  # a defect: logged whole, told by its id
            await abort(context, incident_status(error))
        finally:
            call.broken()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            self._leave(call)

    def go_away(self, stops_at: float) -> None:
        """Tells every stream, and those still to come, that the server stops."""
        self._stops_at = stops_at
        for call in list(self._open):
            self._send_away(call, stops_at)

    async def idle(self) -> None:
        """Returns when no stream is open."""
        await self._none.wait()

    def _enter(self, call: StreamCall) -> None:
        self._open.add(call)
        self._metrics.streams = len(self._open)
        self._none.clear()
        if self._stops_at is not None:
            self._send_away(call, self._stops_at)

    def _send_away(self, call: StreamCall, stops_at: float) -> None:
        left_s = max(0.0, stops_at - self._core.now())
        call.go_away(left_s)
        asyncio.get_running_loop().call_later(min(_LINGER_S, left_s / 2), call.stop_lingering)

    def _leave(self, call: StreamCall) -> None:
        self._open.discard(call)
        self._metrics.streams = len(self._open)
        if not self._open:
            self._none.set()


async def _read(context: "grpc.aio.ServicerContext[Any, Any]", call: StreamCall, outbox: Outbox) -> None:
    try:
        while True:
            await outbox.room()
            request = await context.read()
            if request is grpc.aio.EOF:
                call.half_close()
                return
            call.receive(request)
    except grpc.aio.BaseError:
        call.half_close()
    except Exception as error:  # told to the writer, which ends the call
        outbox.fail(error)


class GrpcServer:
    """The server and its port.

    Args:
        core: what drives the sessions.
        services: unary handlers by full service name; Stream joins `conveyor.v1.SessionService`.
        calls: unary calls under way.
        shared: the port may be held by other processes of this server, which have made sure that nobody else has it.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        services: Mapping[str, dict[str, "grpc.RpcMethodHandler[Any, Any]"]],
        *,
        calls: Calls,
        limits: WireLimits,
        shared: bool = False,
    ) -> None:
        self.calls = calls
        self.streams = Streams(core, metrics, limits)
        self.server = grpc.aio.server(options=_options(limits, shared=shared))
        stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self.streams.serve,
            request_deserializer=session_pb2.StreamRequest.FromString,
        )
        sessions = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name
        for name, handlers in services.items():
            own = {"Stream": stream} if name == sessions else {}
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {**handlers, **own}),))

    def listen(self, host: str, port: int, tls: Tls | None) -> int:
        """Binds the port and returns it (port 0: one that is free).

        Raises:
            StartError: the port is taken, or a TLS file cannot be read.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                return self.server.add_insecure_port(address)
            return self.server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            why = "it is in use or not an address of this machine" + (", or the TLS files do not fit" if tls else "")
            raise StartError(f"cannot listen on {address}: {why}") from error

    async def start(self) -> None:
        """Takes calls from now on."""
        await self.server.start()

    async def drain(self, stops_at: float, now: float) -> bool:
        """Sends streams away and waits until they and the unary calls are done; False: time ran out."""
        self.streams.go_away(stops_at)
        try:
            async with asyncio.timeout(max(0.0, stops_at - now)):
                await self.streams.idle()
                await self.calls.idle()
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float | None = None) -> None:
        """Ends what is left and lets go of the port."""
        await self.server.stop(grace_s)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    try:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        ca = tls.client_ca.read_bytes() if tls.client_ca is not None else None
    except OSError as error:
        raise StartError(f"cannot read {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _options(limits: WireLimits, *, shared: bool) -> Sequence[tuple[str, int]]:
    return (
        # Two servers on one port would each hold half of the sessions; only workers of one server mean to.
        ("grpc.so_reuseport", int(shared)),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A peer that vanished without a word is noticed, and its streams freed.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ask for signs of life as often.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    )
