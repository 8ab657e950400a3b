"""The sockets below the connections: one epoll, one read and one write per connection and turn.

Invariant: a socket never blocks the loop. What the kernel does not take at once waits in the wire's outbox, and goes
before everything else on that wire.
"""

import contextlib
import errno
import resource
import select
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conveyor.bench.alarm import Alarm
from conveyor.bench.connection import Connection
from conveyor.bench.inbox import Inbox
from conveyor.bench.spec import LoadError

_READ_BYTES = 256 << 10
_BUFFER_BYTES = 8 << 20
# Arrays may read a fixed number of bytes from any message's begin.
SPARE_BYTES = 64
_CONNECT_TIMEOUT_S = 10.0
_SPARE_DESCRIPTORS = 32
# Shorter waits are timed by an alarm: epoll rounds up to milliseconds.
_COARSE_S = 0.003
_ROUNDED_UP_S = 0.001
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


@dataclass(slots=True)
class Wire:
    """One socket and the connection on it.

    Attributes:
        socket: connected, not blocking.
        connection: what is spoken on it.
        tail: bytes of a frame whose rest has not come.
        outbox: bytes that the kernel has not taken yet.
        blocked: epoll was asked to tell when it takes more.
    """

    socket: socket.socket
    connection: Connection
    tail: bytes = b""
    outbox: bytearray = field(default_factory=bytearray)
    blocked: bool = False


class Sockets:
    """All wires of one process. Belongs to one thread.

    Args:
        target: HOST:PORT.
        connections: one for each wire.
        root_certificates: as LoadSpec.root_certificates.

    Raises:
        LoadError: nobody listens there, or TLS fails.
    """

    def __init__(self, target: str, connections: Sequence[Connection], root_certificates: Path | None) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.inbox = Inbox(memoryview(bytearray(_BUFFER_BYTES + SPARE_BYTES)))
        self._wires: list[Wire] = []
        _raise_limit(len(connections))
        self._epoll = select.epoll()
        self._alarm = Alarm()
        self._epoll.register(self._alarm.fileno(), _READ)
        self._by_descriptor: dict[int, Wire] = {}
        tls = _tls_context(root_certificates)
        try:
            for connection in connections:
                self._add(Wire(_connect(target, tls), connection))
        except OSError as error:
            self.close()
            raise LoadError(f"{target} cannot be reached: {error}") from error
        for wire in self._wires:
            self.send(wire)

    def _add(self, wire: Wire) -> None:
        self._wires.append(wire)
        self._by_descriptor[wire.socket.fileno()] = wire
        self._epoll.register(wire.socket.fileno(), _READ)

    @property
    def wires(self) -> Sequence[Wire]:
        """In the order of the connections."""
        return self._wires

    def turn(self, timeout_s: float) -> Inbox:
        """Waits for something to come, at most about that long, and reads each ready socket once.

        A wait of some milliseconds may end one too early, and never ends late.

        Returns:
            What came; the next turn overwrites it.

        Raises:
            LoadError: the server closed a connection, or broke the protocol.
        """
        inbox = self.inbox
        inbox.clear()
        if _COARSE_S > timeout_s > 0:
            self._alarm.set(timeout_s)
            timeout_s = _COARSE_S
        end = 0
        for descriptor, events in self._epoll.poll(timeout_s - _ROUNDED_UP_S if timeout_s else 0):
            wire = self._by_descriptor.get(descriptor)
            if wire is None:
                self._alarm.clear()
                continue
            if events & _WRITE:
                self.send(wire)
            if events & ~_WRITE and end + _READ_BYTES + len(wire.tail) <= _BUFFER_BYTES:
                end = self._read(wire, end)
        return inbox

    def _read(self, wire: Wire, start: int) -> int:
        """Reads once into the buffer from `start` on; returns where the free part begins."""
        inbox, end = self.inbox, start
        if wire.tail:
            end += len(wire.tail)
            inbox.buffer[start:end] = wire.tail
        try:
            count = wire.socket.recv_into(inbox.buffer[end : end + _READ_BYTES])
            if isinstance(wire.socket, ssl.SSLSocket):
                # epoll does not see what OpenSSL has decrypted already.
                while pending := min(wire.socket.pending(), _READ_BYTES - count):
                    count += wire.socket.recv_into(inbox.buffer[end + count : end + count + pending])
        except (BlockingIOError, ssl.SSLWantReadError):
            return start
        except OSError as error:
            raise LoadError(f"a connection broke: {error}") from error
        if not count:
            raise LoadError("the server closed a connection")
        self.bytes_received += count
        end += count
        parsed = wire.connection.receive(start, end, inbox)
        wire.tail = bytes(inbox.buffer[parsed:end])
        if wire.connection.outlet.bytes:
            self.send(wire)
        return end

    def send(self, wire: Wire, data: memoryview | bytes = b"") -> None:
        """Sends what the connection has to say, then `data`; what the kernel does not take now is sent later."""
        said = wire.connection.outlet.bytes
        if wire.outbox:
            wire.outbox += said
            wire.outbox += data
            said.clear()
            del wire.outbox[: self._write(wire, wire.outbox)]
        elif said:
            said += data
            wire.outbox += memoryview(said)[self._write(wire, said) :]
            said.clear()
        elif data:
            wire.outbox += data[self._write(wire, data) :]
        self._watch(wire)

    def _write(self, wire: Wire, data: memoryview | bytes | bytearray) -> int:
        try:
            sent = wire.socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        except OSError as error:
            raise LoadError(f"a connection broke: {error}") from error
        self.bytes_sent += sent
        return sent

    def _watch(self, wire: Wire) -> None:
        """Has epoll tell of room in the kernel exactly while something waits for it."""
        if bool(wire.outbox) is not wire.blocked:
            wire.blocked = not wire.blocked
            self._epoll.modify(wire.socket.fileno(), _READ | _WRITE if wire.blocked else _READ)

    def close(self) -> None:
        """Closes all sockets, whatever is on its way."""
        for wire in self._wires:
            wire.socket.close()
        self._alarm.close()
        self._epoll.close()


def _raise_limit(connections: int) -> None:
    """Lets this process have more descriptors than it usually may, where that many connections need them."""
    wanted = connections + sum(1 for _ in Path("/proc/self/fd").iterdir()) + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _tls_context(root_certificates: Path | None) -> ssl.SSLContext | None:
    if root_certificates is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(root_certificates))
    except (OSError, ssl.SSLError) as error:
        raise LoadError(f"{root_certificates} cannot be read as PEM certificates: {error}") from error
    context.set_alpn_protocols(["h2"])
    return context


def split_target(target: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [HOST]:PORT; LoadError where it is neither."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise LoadError(f"the target is HOST:PORT, not {target!r}")
    return host.strip("[]"), int(port)


def _connect(target: str, tls: ssl.SSLContext | None) -> socket.socket:
    host, port = split_target(target)
    made = socket.create_connection((host, port), _CONNECT_TIMEOUT_S)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            made = _encrypted(made, tls, host)
        made.setblocking(False)
    except BaseException:
        with contextlib.suppress(OSError):
            made.close()
        raise
    return made


def _encrypted(plain: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    made = tls.wrap_socket(plain, server_hostname=host)
    if made.selected_alpn_protocol() != "h2":
        made.close()
        raise OSError(errno.EPROTO, "the server does not speak HTTP/2 over TLS")
    return made
