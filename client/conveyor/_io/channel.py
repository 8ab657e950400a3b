"""How a connection is made: TLS and gRPC channel options, the same under threads and asyncio."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

Option = tuple[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """An encrypted connection. Each file is given as PEM bytes, or as a path to read them from.

    Attributes:
        root_certificates: whom to trust; None: the roots that gRPC ships.
        certificate: the client's own chain, where the server asks for one (mutual TLS).
        private_key: the key to `certificate`.
        server_name: the name to expect in the server's certificate, where it is not the target's host.

    Example:
        `conveyor.connect("models.example:443", tls=conveyor.TLS(root_certificates=Path("ca.pem")))`
    """

    root_certificates: bytes | str | Path | None = None
    certificate: bytes | str | Path | None = None
    private_key: bytes | str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuses half a key pair."""
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("TLS takes certificate and private_key together, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC needs."""
        return grpc.ssl_channel_credentials(
            root_certificates=_pem(self.root_certificates),
            private_key=_pem(self.private_key),
            certificate_chain=_pem(self.certificate),
        )


def _pem(given: bytes | str | Path | None) -> bytes | None:
    if given is None or isinstance(given, bytes):
        return given
    return Path(given).read_bytes()


def channel_options(tls: TLS | None, keepalive_s: float | None, extra: Sequence[Option]) -> list[Option]:
    """GRPC's channel options; the caller's `extra` win."""
    options: dict[str, Any] = {
        # A client has a connection of its own; gRPC would share one among all clients of a target.
        "grpc.use_local_subchannel_pool": 1,
        # The SDK resumes streams itself and knows what may be repeated; gRPC's own waits would only delay it.
        "grpc.enable_retries": 0,
        "grpc.initial_reconnect_backoff_ms": 50,
        "grpc.min_reconnect_backoff_ms": 50,
        "grpc.max_reconnect_backoff_ms": 1000,
        # Answers are as long as the chunks that were sent.
        "grpc.max_receive_message_length": -1,
        "grpc.max_send_message_length": -1,
    }
    if keepalive_s is not None:
        options["grpc.keepalive_time_ms"] = int(keepalive_s * 1000)
        options["grpc.keepalive_timeout_ms"] = min(10_000, int(keepalive_s * 1000))
    if tls is not None and tls.server_name is not None:
        options["grpc.ssl_target_name_override"] = tls.server_name
    options.update(extra)
    return list(options.items())
