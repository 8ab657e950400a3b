"""Whether the ports are free, or whose they are.

Invariant: a port is bound for a moment and never listened on, so that nobody is let in who meant somebody else.
"""

import errno
import http.client
import socket
from collections.abc import Callable, Iterator
from functools import partial

import grpc

from conveyor_server.doctor.finding import Finding, bad, good
from conveyor_server.settings import Settings

_PATIENCE_S = 2.0
_BUILD = "conveyor_build_info"


def check(settings: Settings) -> Iterator[Finding]:
    """The gRPC port, and each worker's metrics port."""
    host = settings.metrics_host or settings.host
    first = settings.metrics_port
    pages = [first + number if first else 0 for number in range(settings.workers)]
    if settings.port and settings.port in pages:
        yield bad(f"port and metrics_port are both {settings.port}", "move one of them: --port, --metrics-port")
        return
    named = next((port for port in pages if port), 0)
    running = bool(named) and _is_conveyor_page(_reachable(host), named)
    yield _port("--port", settings.host, settings.port, lambda: running or _answers_health(settings))
    for port in pages:
        yield _port("--metrics-port", host, port, partial(_is_conveyor_page, _reachable(host), port))


def _port(flag: str, host: str, port: int, is_conveyor: Callable[[], bool]) -> Finding:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not port:
        return good(f"{flag}: any port of {host} that is free")
    if not 0 < port < 1 << 16:
        return bad(f"{flag} {port} is no port", f"give {flag} a number from 1 to 65535")
    try:
        _bind(host, port)
    except socket.gaierror as error:
        return bad(f"{where}: the host has no address ({error.strerror})", "give --host an address of this machine")
    except OSError as error:
        if error.errno == errno.EADDRINUSE and is_conveyor():
            return good(f"{where} is in use by a conveyor that runs; another one cannot start beside it")
        return _taken(where, flag, port, error)
    return good(f"{where} is free")


def _taken(where: str, flag: str, port: int, error: OSError) -> Finding:
    if error.errno == errno.EADDRINUSE:
        return bad(
            f"{where} is in use by something that is no conveyor",
            f"end it (`ss -ltnp 'sport = :{port}'` says what it is), or give another {flag}",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return bad(f"{where} is no address of this machine", "give one that is, 0.0.0.0 for all of them")
    if error.errno == errno.EACCES:
        return bad(
            f"{where} is for privileged processes alone",
            f"give {flag} a port from 1024 on, or the process CAP_NET_BIND_SERVICE",
        )
    return bad(f"{where} cannot be used: {error.strerror}", f"give another host or {flag}")


def _bind(host: str, port: int) -> None:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC and the metrics pages do: what a server that has ended left behind is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _reachable(host: str) -> str:
    """Where to ask for what listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - nothing is bound


def _is_conveyor_page(host: str, port: int) -> bool:
    """A metrics page of ours answers there; or one of ours that shows it to nobody without a token."""
    try:
        connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE_S)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return _BUILD in text or (answer.status in {401, 403} and "Bearer" in text)


def _answers_health(settings: Settings) -> bool:
    """A server answers grpc.health.v1 there. With TLS it is not asked: nobody here knows whom it trusts."""
    if settings.tls_key is not None:
        return False
    host = _reachable(settings.host)
    with grpc.insecure_channel(f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}") as channel:
        # Bytes, so that no package is needed for two messages of one field.
        ask: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            ask(b"", timeout=_PATIENCE_S)
        except grpc.RpcError:
            return False
    return True
