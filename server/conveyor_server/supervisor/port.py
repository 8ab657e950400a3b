"""One port for several processes, and nobody else.

Invariant: while a port is reserved, only sockets that ask to share it and belong to the same user can listen on it, and
nobody listened when the reservation was made. The reserving socket itself never listens, so it is sent no connection.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any, TypeAlias

from conveyor_server.errors import StartError

# Family, address and what else belongs to it, such as the scope of an IPv6 address.
_Place: TypeAlias = tuple[int, str, tuple[Any, ...]]
# A name such as localhost may stand for an address that this machine does not have, beside one that it has.
_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


@contextlib.contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves a port on all addresses of a host, and yields its number (port 0: one that is free).

    Raises:
        StartError: someone else has the port, or the host is not an address of this machine.
    """
    with contextlib.ExitStack() as stack:
        try:
            taken = _reserve(stack, host, port)
        except (OSError, OverflowError) as error:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise StartError(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}") from error
        yield taken


def _reserve(stack: contextlib.ExitStack, host: str, port: int) -> int:
    absent: OSError | None = None
    bound = 0
    for place in _places(host):
        try:
            # Where none is asked for, the first address takes one that is free, and the others the same.
            bound = _bind(stack, place, bound or port)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            absent = error
    if not bound and absent is not None:
        raise absent
    return bound


def _places(host: str) -> Iterator[_Place]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A hosts file may name an address twice.
    for family, (address, _, *scope) in dict.fromkeys((family, address) for family, _, _, _, address in found):
        yield family, str(address), tuple(scope)


def _bind(stack: contextlib.ExitStack, place: _Place, port: int) -> int:
    family, host, scope = place
    address = (host, port, *scope)
    if port:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections of one that has just ended are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    reservation = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
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
