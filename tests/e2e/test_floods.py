"""Peers that mean no good, in raw HTTP/2: what each can cost is bounded, and a neighbour is served all the while."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import conveyor
import numpy as np
import psutil
import pytest
from conveyor.bench import http2
from conveyor.bench.http2 import Flag, Frame

from tests.e2e.conftest import FEATURES, Server, serving

PATIENCE_S = 30.0
HANDSHAKE_S = 1.0
MOST_STREAMS = 50
# A server's caches and buffers may grow; what a flood leaves behind for each of its frames may not.
MOST_GROWTH = 48 << 20
STREAM = "/conveyor.v1.SessionService/Stream"
X = np.ones(FEATURES, np.float32)
ENHANCE_YOUR_CALM, REFUSED_STREAM = 11, 7


@pytest.fixture(scope="module")
def server(nets, tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[Server]:
    flags = ("--handshake-timeout-s", str(HANDSHAKE_S), "--max-streams-per-connection", str(MOST_STREAMS))
    with serving(nets.folder, tmp_path_factory.mktemp("floods"), *flags, "--transport", transport) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def neighbour(server: Server) -> Iterator[conveyor.Session]:
    with conveyor.connect(server.target) as client, client.session("lstm") as session:
        session.step(X)
        yield session


@pytest.fixture
def bounded(server: Server, neighbour: conveyor.Session) -> Iterator[Callable[[], None]]:
    """Holds after the test what held before it; what it yields steps the neighbour."""
    process = psutil.Process(server.process.pid)

    def step() -> None:
        neighbour.step(X, timeout_s=PATIENCE_S)

    step()
    server.get("/metrics")
    before, open_before = process.memory_info().rss, process.num_fds()
    yield step
    step()
    until = time.monotonic() + PATIENCE_S
    while process.num_fds() > open_before or "conveyor_streams_active 1.0" not in server.get("/metrics")[1]:
        assert time.monotonic() < until, f"{process.num_fds()} descriptors are open, and {open_before} were"
        time.sleep(0.05)
    growth = process.memory_info().rss - before
    print(f"memory grew by {growth >> 10} KiB")
    assert growth < MOST_GROWTH
    assert server.process.poll() is None


class Peer:
    """A connection that says what it likes."""

    def __init__(self, server: Server, *, greet: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
        self._left = b""
        self.headers = http2.request_headers(server.target, STREAM, "http")
        if greet:
            # The server's settings are agreed to before they have come: until then it waits with what it has to say.
            self.socket.sendall(http2.greeting() + http2.frame(Frame.SETTINGS, Flag.ACK, 0))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """False: the server has hung up."""
        try:
            self.socket.sendall(data)
        except ConnectionError:
            return False
        return True

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and body of what comes, until the server hangs up."""
        while True:
            while len(self._left) >= http2.FRAME_HEADER_BYTES:
                word, flags, stream = struct.unpack(">IBI", self._left[: http2.FRAME_HEADER_BYTES])
                end = http2.FRAME_HEADER_BYTES + (word >> 8)
                if len(self._left) < end:
                    break
                body, self._left = self._left[http2.FRAME_HEADER_BYTES : end], self._left[end:]
                yield word & 0xFF, flags, stream, body
            try:
                more = self.socket.recv(1 << 16)
            except ConnectionError:
                return
            if not more:
                return
            self._left += more

    def open(self, stream: int) -> bytes:
        return http2.frame(Frame.HEADERS, Flag.END_HEADERS, stream, self.headers)

    def farewell(self) -> int | None:
        """Reads to the end; the error code of the server's GOAWAY, or None where it said none."""
        codes = [struct.unpack(">I", body[4:8])[0] for kind, _, _, body in self.frames() if kind == Frame.GOAWAY]
        return codes[-1] if codes else None


def test_streams_that_are_opened_and_reset_at_once(server: Server, bounded: Callable[[], None]) -> None:
    """CVE-2023-44487, in small."""
    for _ in range(4):
        with Peer(server) as peer:
            for stream in range(1, 2000, 2):
                reset = http2.frame(Frame.RST_STREAM, 0, stream, struct.pack(">I", 8))
                if not peer.send(peer.open(stream) + reset):
                    break
            bounded()


def test_more_streams_than_a_connection_may_have(server: Server, bounded: Callable[[], None]) -> None:
    with Peer(server) as peer:
        for stream in range(1, 2 * 3 * MOST_STREAMS, 2):
            assert peer.send(peer.open(stream))
        refused: set[int] = set()
        for kind, _, stream, body in peer.frames():
            if kind == Frame.RST_STREAM:
                assert struct.unpack(">I", body)[0] in {REFUSED_STREAM, ENHANCE_YOUR_CALM}
                refused.add(stream)
            if len(refused) == 2 * MOST_STREAMS:
                break
        assert min(refused) > 2 * MOST_STREAMS - 2
        bounded()


def test_pings_without_end(server: Server, bounded: Callable[[], None]) -> None:
    with Peer(server) as peer:
        ping = http2.frame(Frame.PING, 0, 0, bytes(8))
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                if not peer.send(ping * 100):
                    break
        bounded()
        assert peer.farewell() in {ENHANCE_YOUR_CALM, None}
        assert not peer.send(ping * 1000) or not peer.send(ping * 1000)


def test_settings_without_end(server: Server, bounded: Callable[[], None]) -> None:
    with Peer(server) as peer:
        settings = http2.settings({http2.Setting.HEADER_TABLE_SIZE: 4096})
        for _ in range(100):
            if not peer.send(settings * 100):
                break
            # Their acknowledgements are read, so that it is not this peer's own socket that ends it.
            peer.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while peer.socket.recv(1 << 16):
                    pass
            peer.socket.settimeout(PATIENCE_S)
        bounded()


def test_headers_without_end(server: Server, bounded: Callable[[], None]) -> None:
    """CONTINUATION frames that never say that they are the last: CVE-2024-27316 and its kin."""
    with Peer(server) as peer:
        more = http2.header_block([("x-more", "y" * 1000)] * 15)
        peer.send(http2.frame(Frame.HEADERS, 0, 1, peer.headers))
        for _ in range(2000):
            if not peer.send(http2.frame(Frame.CONTINUATION, 0, 1, more)):
                break
        bounded()


def test_metadata_that_is_too_large_ends_its_call_alone(server: Server, bounded: Callable[[], None]) -> None:
    with Peer(server) as peer:
        large = http2.request_headers(server.target, STREAM, "http", [("x-more", "y" * 1000)] * 60)
        first, rest = large[: http2.DEFAULT_FRAME_BYTES], large[http2.DEFAULT_FRAME_BYTES :]
        parts = [rest[at : at + http2.DEFAULT_FRAME_BYTES] for at in range(0, len(rest), http2.DEFAULT_FRAME_BYTES)]
        for stream in (1, 3, 5):
            assert peer.send(http2.frame(Frame.HEADERS, 0, stream, first))
            for number, part in enumerate(parts, 1):
                last = Flag.END_HEADERS if number == len(parts) else 0
                assert peer.send(http2.frame(Frame.CONTINUATION, last, stream, part))
        ended: set[int] = set()
        for kind, flags, stream, _ in peer.frames():
            if kind == Frame.RST_STREAM or (kind == Frame.HEADERS and flags & Flag.END_STREAM):
                ended.add(stream)
            if ended == {1, 3, 5}:
                break
        assert ended == {1, 3, 5}
        bounded()


def test_connections_that_say_nothing(server: Server, bounded: Callable[[], None]) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Peer(server, greet=False)) for _ in range(100)]
        half = [stack.enter_context(Peer(server, greet=False)) for _ in range(20)]
        for peer in half:
            peer.send(http2.PREFACE[:7])
        bounded()
        # The server does not wait for ever: it hangs up by itself.
        for peer in (*silent, *half):
            assert list(peer.frames()) == [] or peer.farewell() is None


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(300), bytes(1 << 16)]
)
def test_what_is_not_http2(server: Server, bounded: Callable[[], None], garbage: bytes) -> None:
    with Peer(server, greet=False) as peer:
        peer.send(garbage)
        list(peer.frames())
        bounded()


def test_messages_that_are_begun_and_never_ended(server: Server, bounded: Callable[[], None], tmp_path: Path) -> None:
    """A prefix that promises 15 MiB, and some bytes: memory is not taken for what was only promised."""
    with Peer(server) as peer:
        for stream in range(1, 2 * MOST_STREAMS, 2):
            begun = struct.pack(">BI", 0, 15 << 20) + bytes(100)
            assert peer.send(peer.open(stream) + http2.frame(Frame.DATA, 0, stream, begun))
        bounded()
