"""One HTTP/2 connection without I/O: bytes in, messages and bytes out.

Invariants: every PING and SETTINGS is answered; the windows that the peer sends into are refilled long before they are
empty; what is not plain DATA or WINDOW_UPDATE costs a look of its own, and what breaks the protocol is an error.
"""

import struct

import numpy as np

from conveyor.bench import cycles, http2
from conveyor.bench.cycles import WINDOW_UPDATE, Cycles
from conveyor.bench.extra import needs_extra
from conveyor.bench.http2 import FRAME_HEADER_BYTES, MESSAGE_PREFIX_BYTES, Flag, Frame, Setting
from conveyor.bench.inbox import Inbox
from conveyor.bench.ledger import Integers
from conveyor.bench.outlet import Outlet
from conveyor.bench.spec import LoadError

with needs_extra():
    from hpack import Decoder, HPACKError

_FRAME_HEADER = struct.Struct(">IBI")
_MESSAGE_PREFIX = struct.Struct(">BI")
_WORD = struct.Struct(">I")
# Where frames follow no pattern, one is looked for after so many bytes, after twice as many, and so on.
_LOOK_AGAIN_BYTES = 40
# Fewer bytes are not worth the look.
_WORTH_BYTES = 400
# The windows that we give are 2^31 bytes; they are looked at after so many, and refilled where half of it was used.
_CREDIT_EVERY_BYTES = 1 << 28


class Connection:
    """The client's end. Belongs to one thread.

    Args:
        first: index of its first stream among all streams.
        windows: as Outlet's.

    Attributes:
        outlet: the sending half; what the peer asks for is answered there.
        settled: the peer's settings have come.
        max_streams: streams that the peer takes at once.
    """

    def __init__(self, first: int, windows: Integers) -> None:
        self.outlet = Outlet(first, windows)
        self.settled = False
        self.max_streams = 2**31
        self._first = first
        self._windows = windows
        self._partial: dict[int, bytearray] = {}
        self._decoder = Decoder()
        self._header_block = b""
        self._header_flags = 0
        # Bytes of DATA for which the peer's window was not refilled: of each stream, and of all together.
        self._received: list[int] = []
        self._uncredited = 0

    def open(self, header_block: bytes) -> None:
        """Opens the next stream."""
        self.outlet.open(header_block)
        self._received.append(0)

    def receive(self, start: int, end: int, inbox: Inbox) -> int:
        """Reads all whole frames in `inbox.buffer[start:end]`; returns where the first unfinished one begins.

        Raises:
            LoadError: what came is no HTTP/2 for us.
        """
        buffer, partial, received, waiting = inbox.buffer, self._partial, self._received, self.outlet.waiting
        header, prefix, increment = _FRAME_HEADER.unpack_from, _MESSAGE_PREFIX.unpack_from, _WORD.unpack_from
        first, opened, windows, at = self._first, self.outlet.opened, self._windows, start
        look_at, rest_bytes = start, _LOOK_AGAIN_BYTES
        while at + FRAME_HEADER_BYTES <= end:
            if at >= look_at:
                at_next = self._read_cycles(at, end, inbox)
                if at_next > at:
                    at = look_at = at_next
                    rest_bytes = _LOOK_AGAIN_BYTES
                    continue
                look_at = at + rest_bytes
                rest_bytes *= 2
            word, flags, stream_id = header(buffer, at)
            body = at + FRAME_HEADER_BYTES
            size = word >> 8
            at = body + size
            if at > end:
                return self._received_until(body - FRAME_HEADER_BYTES)
            if word & 0xFF == Frame.DATA and not flags and stream_id & 1 and stream_id >> 1 < opened:
                stream = first + (stream_id >> 1)
                received[stream_id >> 1] += size
                self._uncredited += size
                # Nearly always one whole message.
                if stream not in partial and prefix(buffer, body) == (0, size - MESSAGE_PREFIX_BYTES):
                    inbox.offsets.append(body + MESSAGE_PREFIX_BYTES)
                    inbox.sizes.append(size - MESSAGE_PREFIX_BYTES)
                    inbox.streams.append(stream)
                else:
                    self._split(stream, body, at, inbox)
            elif word == WINDOW_UPDATE and not waiting and stream_id < 2 * opened:
                if stream_id:
                    windows[first + (stream_id >> 1)] += increment(buffer, body)[0]
                else:
                    self.outlet.window += increment(buffer, body)[0]
            else:
                self._unusual(word & 0xFF, flags, stream_id & 0x7FFFFFFF, buffer[body:at], inbox)
        return self._received_until(at)

    def _received_until(self, at: int) -> int:
        if self._uncredited >= _CREDIT_EVERY_BYTES:
            self._credit()
        return at

    def _read_cycles(self, begin: int, end: int, inbox: Inbox) -> int:
        """Reads frames that follow a pattern, by arrays; returns where they end, `begin` where there is none."""
        if end - begin < _WORTH_BYTES or self._partial:
            return begin
        found = cycles.find(inbox.buffer, begin, end)
        if found is None or found.ids.max() >= 2 * self.outlet.opened:
            # Streams that are not ours are found, and refused, one by one.
            return begin
        update = 0
        for place, word in enumerate(found.pattern.words):
            if word == WINDOW_UPDATE:
                self.outlet.widen_many(found.ids[:, place], found.increments[:, update])
                update += 1
            else:
                self._take_column(begin, found, found.ids[:, place], inbox)
        return begin + found.count * found.pattern.stride

    def _take_column(self, begin: int, found: Cycles, ids: Integers, inbox: Inbox) -> None:
        """Takes the messages of a run of cycles, on streams of these numbers."""
        if np.count_nonzero(ids & 1) < len(ids):
            raise LoadError("the server sends DATA on a stream that was never opened")
        pattern, count, places = found.pattern, found.count, ids >> 1
        size = pattern.message_bytes + MESSAGE_PREFIX_BYTES
        self._uncredited += count * size
        for place in places.tolist():
            self._received[place] += size
        message = begin + pattern.message_at
        inbox.offsets.extend(range(message, message + count * pattern.stride, pattern.stride))
        inbox.sizes.extend([pattern.message_bytes] * count)
        inbox.streams.extend((places + self._first).tolist())

    def _split(self, stream: int, begin: int, end: int, inbox: Inbox) -> None:
        """Takes the contents of a DATA frame: any part of any number of messages."""
        if stream not in self._partial:
            while begin + MESSAGE_PREFIX_BYTES <= end:
                compressed, length = _MESSAGE_PREFIX.unpack_from(inbox.buffer, begin)
                message = begin + MESSAGE_PREFIX_BYTES
                if compressed or message + length > end:
                    break
                inbox.offsets.append(message)
                inbox.sizes.append(length)
                inbox.streams.append(stream)
                begin = message + length
        if begin < end:
            self._continue(stream, inbox.buffer[begin:end], inbox)

    def _continue(self, stream: int, data: memoryview, inbox: Inbox) -> None:
        """Takes a piece of a message that is spread over frames."""
        gathered = self._partial.setdefault(stream, bytearray())
        gathered += data
        begin = 0
        while begin + MESSAGE_PREFIX_BYTES <= len(gathered):
            compressed, length = _MESSAGE_PREFIX.unpack_from(gathered, begin)
            if compressed:
                raise LoadError("the server compresses its messages, which nobody asked for")
            message = begin + MESSAGE_PREFIX_BYTES
            if message + length > len(gathered):
                break
            inbox.loose.append((len(inbox.offsets), stream, bytes(gathered[message : message + length])))
            begin = message + length
        del gathered[:begin]
        if not gathered:
            del self._partial[stream]

    def _credit(self) -> None:
        """Refills the windows that the peer sends into."""
        self.outlet.bytes += http2.window_update(0, self._uncredited)
        self._uncredited = 0
        for index, count in enumerate(self._received):
            if count >= _CREDIT_EVERY_BYTES // 2:
                self.outlet.bytes += http2.window_update(2 * index + 1, count)
                self._received[index] = 0

    def _unusual(self, kind: int, flags: int, stream_id: int, body: memoryview, inbox: Inbox) -> None:
        if kind == Frame.WINDOW_UPDATE:
            self.outlet.widen(self._stream(stream_id) if stream_id else None, _WORD.unpack(body)[0] & 0x7FFFFFFF)
        elif kind == Frame.DATA:
            self._data(flags, stream_id, body, inbox)
        elif kind in {Frame.HEADERS, Frame.CONTINUATION}:
            self._headers(kind, flags, stream_id, body, inbox)
        elif kind == Frame.PING:
            if not flags & Flag.ACK:
                self.outlet.bytes += http2.frame(Frame.PING, Flag.ACK, 0, body)
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
        if not stream_id & 1 or index >= self.outlet.opened:
            raise LoadError(f"the server speaks of stream {stream_id}, which was never opened")
        return self._first + index

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
                self.outlet.set_initial_window(value)
            elif identifier == Setting.MAX_FRAME_SIZE:
                self.outlet.frame_bytes = value
            elif identifier == Setting.MAX_CONCURRENT_STREAMS:
                self.max_streams = value
        self.settled = True
        self.outlet.bytes += http2.frame(Frame.SETTINGS, Flag.ACK, 0)

    def _go_away(self, body: memoryview, inbox: Inbox) -> None:
        last, code = struct.unpack_from(">II", body)
        text = bytes(body[8:]).decode("utf-8", "replace")
        if code:
            raise LoadError(f"the server ended the connection (HTTP/2 error {code}): {text}")
        for index in range((last + 1) // 2, self.outlet.opened):
            inbox.ended.append((self._first + index, None, "the server took no more streams"))
