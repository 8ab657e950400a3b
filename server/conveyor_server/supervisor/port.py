"""One port for several processes, and nobody else.

Invariant: while a port is reserved, only sockets that ask to share it and belong to the same user can listen on it, and
nobody listened when the reservation was made. The reserving socket itself never listens, so it is sent no connection.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from conveyor_server.errors import StartError


@contextlib.contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves a port on all addresses of a host, and yields its number (port 0: one that is free).

    Raises:
        StartError: someone else has the port, or the host is not an address of this machine.
    """
    with contextlib.ExitStack() as stack:
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                here = (address[0], port, *address[2:])
                if port:
                    with socket.socket(family, kind, protocol) as probe:
                        # As servers do: connections of one that has just ended are no hindrance.
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(here)
                port = _bind(stack.enter_context(socket.socket(family, kind, protocol)), here)
        except OSError as error:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise StartError(f"cannot listen on {where}: {error.strerror}") from error
        yield port


def _bind(reservation: socket.socket, address: tuple[Any, ...]) -> int:
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        # Without SO_REUSEADDR, so that the probe of another supervisor fails before any worker of this one listens.
        reservation.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Nobody listens, as the probe saw: these are connections of a server that has just ended.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(address)
    return int(reservation.getsockname()[1])
