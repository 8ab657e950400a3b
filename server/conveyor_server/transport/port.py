"""The gRPC port: how it is bound, and what both transports grant on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from conveyor_server.errors import StartError
from conveyor_server.transport.certificates import Certificates, Tls


@dataclass(frozen=True, slots=True)
class WireOptions:
    """What a transport grants.

    Attributes:
        max_message_bytes: of one request; a larger one ends its call with RESOURCE_EXHAUSTED, and sessions live on.
        max_outgoing_bytes: a stream with more than this unsent reads no request.
        max_streams_per_connection: calls that one connection may have open; more wait at the client.
        handshake_s: how long a peer may take to begin to talk, TLS included.
        messages_per_s: that are read of a tenant's streams; 0: any number. See pace.
        shared: the port may be held by other processes of this server, which have made sure that nobody else has it.
        diagnostics: a stream may ask to be answered by the transport alone.
        reflection: whoever asks is told which services there are.
        compiled: turns go to the compiled part first, where it is built.
    """

    max_message_bytes: int = 16 << 20
    max_outgoing_bytes: int = 4 << 20
    max_streams_per_connection: int = 10_000
    handshake_s: float = 20.0
    messages_per_s: float = 0.0
    shared: bool = False
    diagnostics: bool = False
    reflection: bool = True
    compiled: bool = True


class PortTaker(Protocol):
    """A gRPC server of either kind."""

    def add_insecure_port(self, address: str) -> int:
        """Binds an address."""

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Binds an address with TLS."""


def listen(server: PortTaker, host: str, port: int, tls: Tls | None) -> int:
    """Binds the port and returns it (port 0: one that is free).

    Raises:
        StartError: the port is taken, or the TLS files cannot be used.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, Certificates(tls).credentials())
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address}: it is in use or not an address of this machine") from error


def channel_options(options: WireOptions) -> Sequence[tuple[str, int]]:
    """As gRPC names them."""
    return (
        # Two servers on one port would each hold half of the sessions; only workers of one server mean to.
        ("grpc.so_reuseport", int(options.shared)),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A burst of streams is taken as it comes; grpc would begin to refuse them at 1000 that wait.
        ("grpc.server.max_pending_requests", 100_000),
        ("grpc.server.max_pending_requests_hard_limit", 200_000),
        ("grpc.max_concurrent_streams", options.max_streams_per_connection),
        # A connection that says nothing costs a socket for so long.
        ("grpc.server_handshake_timeout_ms", int(options.handshake_s * 1e3)),
        # A peer that vanished without a word is noticed, and its streams freed.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ask for signs of life as often; who does three times too often is sent away.
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    )
