"""What a gRPC client says in HTTP/2 (RFC 9113), as bytes.

Invariant: nothing here has state. Header fields are written as literals without indexing, so every stream's header
block is the same bytes and no table has to be kept.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum, IntFlag

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES = 9
# gRPC's own prefix of a message: compressed (1 byte), length (4 bytes).
MESSAGE_PREFIX_BYTES = 5
DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_FRAME_BYTES = 16_384
MAX_WINDOW_BYTES = 2**31 - 1


class Frame(IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntFlag):
    """Frame flags. ACK and END_STREAM are the same bit of different frames."""

    END_STREAM = 0x01
    ACK = 0x01
    END_HEADERS = 0x04
    PADDED = 0x08
    PRIORITY = 0x20


class Setting(IntEnum):
    """Settings that matter here."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


def frame(kind: Frame, flags: int, stream_id: int, body: bytes | bytearray | memoryview = b"") -> bytes:
    """One frame."""
    return struct.pack(">IBI", len(body) << 8 | kind, flags, stream_id) + body


def settings(values: dict[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(Frame.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *item) for item in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """Lets the peer send so many bytes more; stream 0 is the connection."""
    return frame(Frame.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", increment))


def greeting() -> bytes:
    """The first bytes of a connection: preface, settings, and the largest window there is."""
    values = {Setting.ENABLE_PUSH: 0, Setting.INITIAL_WINDOW_SIZE: MAX_WINDOW_BYTES}
    return PREFACE + settings(values) + window_update(0, MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES)


def header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Header fields as HPACK literals without indexing, no Huffman code."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def request_headers(authority: str, path: str, scheme: str, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """The header block of a gRPC call."""
    return header_block(
        [
            (":method", "POST"),
            (":scheme", scheme),
            (":path", path),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "conveyor-bench"),
            *metadata,
        ]
    )


def message(body: bytes) -> bytes:
    """A gRPC message: prefix and body, not compressed."""
    return struct.pack(">BI", 0, len(body)) + body


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    # An HPACK integer with a prefix of 7 bits.
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, out = len(data) - 127, bytearray([127])
    while rest >= 128:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out) + data
