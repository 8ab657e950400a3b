"""One HTTP/2 connection without I/O: bytes in, messages and bytes out.

Invariants: never more is sent than the peer's windows (connection and stream) allow, and what they do not allow waits
here in order; every PING and SETTINGS is answered; the peer's own windows are refilled long before they are empty.
"""

import struct
from collections import deque

import numpy as np
from numpy.typing import NDArray

from conveyor.bench import http2
from conveyor.bench.extra import needs_extra
from conveyor.bench.http2 import FRAME_HEADER_BYTES, Flag, Frame, Setting
from conveyor.bench.inbox import Inbox
from conveyor.bench.spec import LoadError

with needs_extra():
    from hpack import Decoder, HPACKError

_FRAME_HEADER = struct.Struct(">IBI")
_MESSAGE_PREFIX = struct.Struct(">BI")
_WORD = struct.Struct(">I")
# The windows that we give are 2^31 bytes; they are looked at after so many, and refilled where half of it was used.
_CREDIT_EVERY_BYTES = 1 << 28


class Connection:
    """The client's end. Belongs to one thread.

    Args:
        first: index of its first stream among all streams.
        stream_windows: bytes `[all streams]` that may be sent on each stream; shared, so that others can take from it.

    Attributes:
        outgoing: bytes to be sent, in order; whoever sends them empties it.
        window: bytes that may be sent on all its streams together.
        max_streams: streams that the peer takes at once.
        waiting: streams whose messages wait for a window.
    """

    def __init__(self, first: int, stream_windows: NDArray[np.int64]) -> None:
        self.outgoing = bytearray(http2.greeting())
        self.window = http2.DEFAULT_WINDOW_BYTES
        self.max_streams = 2**31
        self.waiting: dict[int, deque[memoryview]] = {}
        self.settled = False
        self._first = first
        self._windows = stream_windows
        self._initial_window = http2.DEFAULT_WINDOW_BYTES
        self.frame_bytes = http2.DEFAULT_FRAME_BYTES
        self._opened = 0
        self._partial: dict[int, bytearray] = {}
        self._decoder = Decoder()
        self._header_block = b""
        self._header_flags = 0
        self._received: list[int] = []
        self._uncredited = 0

    # ------------------------------------------------------------ sending

    def open(self, header_block: bytes) -> int:
        """Opens the next stream; returns its index among all streams."""
        stream = self._first + self._opened
        self._opened += 1
        self._received.append(0)
        self._windows[stream] = self._initial_window
        self.outgoing += http2.frame(Frame.HEADERS, Flag.END_HEADERS, self.stream_id(stream), header_block)
        return stream

    def stream_id(self, stream: int) -> int:
        """The number on the wire of a stream index: 1, 3, 5, ..."""
        return 2 * (stream - self._first) + 1

    def queue(self, stream: int, data: bytes | bytearray | memoryview) -> None:
        """Sends messages (with gRPC's prefix), as far as the windows allow; the rest waits here."""
        self.waiting.setdefault(stream, deque()).append(memoryview(data))
        self._pump(stream)

    def half_close(self, stream: int) -> None:
        """Ends our side of a stream, on which nothing waits any more."""
        self.outgoing += http2.frame(Frame.DATA, Flag.END_STREAM, self.stream_id(stream))

    def _pump(self, stream: int) -> None:
        """Sends what waits on a stream, as far as the windows allow."""
        pieces = self.waiting[stream]
        stream_id = self.stream_id(stream)
        window = min(self.window, int(self._windows[stream]))
        sent = 0
        while pieces and (window > sent or not pieces[0]):
            size = min(len(pieces[0]), window - sent, self.frame_bytes)
            self.outgoing += _FRAME_HEADER.pack(size << 8 | Frame.DATA, 0, stream_id)
            self.outgoing += pieces[0][:size]
            sent += size
            if size == len(pieces[0]):
                pieces.popleft()
            else:
                pieces[0] = pieces[0][size:]
        self.window -= sent
        self._windows[stream] -= sent
        if not pieces:
            del self.waiting[stream]

    # ------------------------------------------------------------ receiving

    def receive(self, start: int, end: int, inbox: Inbox) -> int:
        """Reads all whole frames in `inbox.buffer[start:end]`; returns where the first unfinished one begins."""
        buffer, partial, received = inbox.buffer, self._partial, self._received
        header, prefix = _FRAME_HEADER.unpack_from, _MESSAGE_PREFIX.unpack_from
        offsets, sizes, streams = inbox.offsets.append, inbox.sizes.append, inbox.streams.append
        first, at, data_bytes = self._first, start, 0
        while at + FRAME_HEADER_BYTES <= end:
            word, flags, stream_id = header(buffer, at)
            body = at + FRAME_HEADER_BYTES
            size = word >> 8
            at_next = body + size
            if at_next > end:
                break
            if word & 0xFF or flags:
                self._unusual(word & 0xFF, flags, stream_id & 0x7FFFFFFF, buffer[body:at_next], inbox)
            else:
                # A DATA frame without any flag, and mostly one whole message in it.
                data_bytes += size
                received[stream_id >> 1] += size
                stream = first + (stream_id >> 1)
                if stream in partial:
                    self._continue(stream, buffer[body:at_next], inbox)
                else:
                    while body + 5 <= at_next:
                        compressed, length = prefix(buffer, body)
                        if body + 5 + length > at_next or compressed:
                            break
                        offsets(body + 5)
                        sizes(length)
                        streams(stream)
                        body += 5 + length
                    if body < at_next:
                        self._continue(stream, buffer[body:at_next], inbox)
            at = at_next
        if data_bytes:
            self._uncredited += data_bytes
            if self._uncredited >= _CREDIT_EVERY_BYTES:
                self._credit()
        return at

    def _continue(self, stream: int, data: memoryview, inbox: Inbox) -> None:
        """Takes a piece of a message that is spread over frames."""
        gathered = self._partial.setdefault(stream, bytearray())
        gathered += data
        begin = 0
        while begin + 5 <= len(gathered):
            compressed, length = _MESSAGE_PREFIX.unpack_from(gathered, begin)
            if compressed:
                raise LoadError("the server compresses its messages, which nobody asked for")
            end = begin + 5 + length
            if end > len(gathered):
                break
            inbox.loose.append((len(inbox.offsets), stream, bytes(gathered[begin + 5 : end])))
            begin = end
        if begin == len(gathered):
            del self._partial[stream]
        else:
            del gathered[:begin]

    def _credit(self) -> None:
        """Refills the windows that the peer sends into."""
        self.outgoing += http2.window_update(0, self._uncredited)
        self._uncredited = 0
        for index, count in enumerate(self._received):
            if count >= _CREDIT_EVERY_BYTES // 2:
                self.outgoing += http2.window_update(2 * index + 1, count)
                self._received[index] = 0

    # ------------------------------------------------------------ frames that are not plain DATA

    def _unusual(self, kind: int, flags: int, stream_id: int, body: memoryview, inbox: Inbox) -> None:
        if kind == Frame.WINDOW_UPDATE:
            self._widen(stream_id, _WORD.unpack(body)[0] & 0x7FFFFFFF)
        elif kind == Frame.DATA:
            self._data(flags, stream_id, body, inbox)
        elif kind in {Frame.HEADERS, Frame.CONTINUATION}:
            self._headers(kind, flags, stream_id, body, inbox)
        elif kind == Frame.PING:
            if not flags & Flag.ACK:
                self.outgoing += http2.frame(Frame.PING, Flag.ACK, 0, body)
        elif kind == Frame.SETTINGS:
            if not flags & Flag.ACK:
                self._settings(body)
        elif kind == Frame.RST_STREAM:
            code = _WORD.unpack(body)[0]
            inbox.ended.append((self._stream(stream_id), None, f"the server reset the stream (HTTP/2 error {code})"))
        elif kind == Frame.GOAWAY:
            self._go_away(body, inbox)
        elif kind == Frame.PUSH_PROMISE:
            raise LoadError("the server pushes, which HTTP/2 lets no one do after ENABLE_PUSH 0")
        # Frames of other types, PRIORITY among them, are to be ignored.

    def _stream(self, stream_id: int) -> int:
        index = stream_id >> 1
        if not stream_id & 1 or index >= self._opened:
            raise LoadError(f"the server speaks of stream {stream_id}, which was never opened")
        return self._first + index

    def _widen(self, stream_id: int, increment: int) -> None:
        if stream_id:
            stream = self._stream(stream_id)
            self._windows[stream] += increment
            if stream in self.waiting:
                self._pump(stream)
        else:
            self.window += increment
            self._pump_all()

    def _pump_all(self) -> None:
        for stream in list(self.waiting):
            if self.window <= 0:
                break
            self._pump(stream)

    def _data(self, flags: int, stream_id: int, body: memoryview, inbox: Inbox) -> None:
        stream = self._stream(stream_id)
        self._received[stream_id >> 1] += len(body)
        self._uncredited += len(body)
        if flags & Flag.PADDED:
            body = body[1 : len(body) - body[0]]
        if body:
            self._continue(stream, body, inbox)
        if flags & Flag.END_STREAM:
            inbox.ended.append((stream, None, "the server ended the stream without a status"))

    def _headers(self, kind: int, flags: int, stream_id: int, body: memoryview, inbox: Inbox) -> None:
        if kind == Frame.HEADERS:
            self._header_flags = flags
            if flags & Flag.PADDED:
                body = body[1 : len(body) - body[0]]
            if flags & Flag.PRIORITY:
                body = body[5:]
            self._header_block = b""
        self._header_block += bytes(body)
        if not flags & Flag.END_HEADERS:
            return
        try:
            fields = {str(name): str(value) for name, value in self._decoder.decode(self._header_block)}
        except HPACKError as error:
            raise LoadError(f"the server's headers cannot be read: {error}") from error
        stream = self._stream(stream_id)
        if fields.get(":status", "200") != "200":
            inbox.ended.append((stream, None, f"the server answered with HTTP status {fields[':status']}"))
        elif self._header_flags & Flag.END_STREAM:
            status = int(fields.get("grpc-status", "2"))
            inbox.ended.append((stream, status, fields.get("grpc-message", "")))

    def _settings(self, body: memoryview) -> None:
        for identifier, value in struct.iter_unpack(">HI", body):
            if identifier == Setting.INITIAL_WINDOW_SIZE:
                self._windows[self._first : self._first + self._opened] += value - self._initial_window
                self._initial_window = value
            elif identifier == Setting.MAX_FRAME_SIZE:
                self.frame_bytes = value
            elif identifier == Setting.MAX_CONCURRENT_STREAMS:
                self.max_streams = value
        self.settled = True
        self.outgoing += http2.frame(Frame.SETTINGS, Flag.ACK, 0)
        self._pump_all()

    def _go_away(self, body: memoryview, inbox: Inbox) -> None:
        last, code = struct.unpack_from(">II", body)
        text = bytes(body[8:]).decode("utf-8", "replace")
        if code:
            raise LoadError(f"the server ended the connection (HTTP/2 error {code}): {text}")
        for index in range((last + 1) // 2, self._opened):
            inbox.ended.append((self._first + index, None, "the server took no more streams"))
