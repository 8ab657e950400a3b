"""What one connection has to say, as far as its peer lets it.

Invariant: never more is sent than the peer's windows (of the connection and of each stream) allow; what they do not
allow waits here, in order, and goes as soon as a window opens.
"""

import struct
from collections import deque

import numpy as np

from conveyor.bench import http2
from conveyor.bench.http2 import Flag, Frame
from conveyor.bench.ledger import Integers

_FRAME_HEADER = struct.Struct(">IBI")


class Outlet:
    """The sending half of a connection. Belongs to one thread.

    Args:
        first: index of the connection's first stream among all streams.
        windows: bytes `[all streams]` that may be sent on each stream; shared with whoever sends past `queue`.

    Attributes:
        bytes: to be sent, in order; whoever sends them empties it.
        window: bytes that may be sent on all streams together.
        frame_bytes: the largest frame that the peer takes.
        waiting: streams whose messages wait for a window.
        opened: streams so far.
    """

    def __init__(self, first: int, windows: Integers) -> None:
        self.bytes = bytearray(http2.greeting())
        self.window = http2.DEFAULT_WINDOW_BYTES
        self.frame_bytes = http2.DEFAULT_FRAME_BYTES
        self.waiting: dict[int, deque[memoryview]] = {}
        self.opened = 0
        self._first = first
        self._windows = windows
        self._initial_window = http2.DEFAULT_WINDOW_BYTES

    def open(self, header_block: bytes) -> None:
        """Opens the next stream."""
        stream = self._first + self.opened
        self.opened += 1
        self._windows[stream] = self._initial_window
        self.bytes += http2.frame(Frame.HEADERS, Flag.END_HEADERS, self._stream_id(stream), header_block)

    def half_close(self, stream: int) -> None:
        """Ends our side of a stream, on which nothing waits any more."""
        self.bytes += http2.frame(Frame.DATA, Flag.END_STREAM, self._stream_id(stream))

    def queue(self, stream: int, data: bytes | memoryview) -> None:
        """Sends messages (with gRPC's prefix), as far as the windows allow; the rest waits here."""
        self.waiting.setdefault(stream, deque()).append(memoryview(data))
        self._pump(stream)

    def widen(self, stream: int | None, increment: int) -> None:
        """The peer takes so many bytes more, on a stream or (None) on all together."""
        if stream is None:
            self.window += increment
            self._pump_all()
            return
        self._windows[stream] += increment
        if stream in self.waiting:
            self._pump(stream)

    def widen_many(self, ids: Integers, increments: Integers) -> None:
        """As `widen`, for HTTP/2's stream numbers `[n]` (0: all together) and increments `[n]`."""
        on_streams = np.count_nonzero(ids)
        if on_streams < len(ids):
            together = ids == 0
            self.window += int(increments[together].sum())
            ids, increments = ids[~together], increments[~together]
        if on_streams:
            np.add.at(self._windows, self._first + (ids >> 1), increments)
        if self.waiting:
            self._pump_all()

    def set_initial_window(self, size: int) -> None:
        """The peer gives all streams, open ones too, another window."""
        self._windows[self._first : self._first + self.opened] += size - self._initial_window
        self._initial_window = size
        self._pump_all()

    def _stream_id(self, stream: int) -> int:
        return 2 * (stream - self._first) + 1

    def _pump_all(self) -> None:
        for stream in list(self.waiting):
            if self.window <= 0:
                break
            self._pump(stream)

    def _pump(self, stream: int) -> None:
        """Sends what waits on a stream, as far as the windows allow."""
        pieces = self.waiting[stream]
        stream_id = self._stream_id(stream)
        window = min(self.window, int(self._windows[stream]))
        sent = 0
        while pieces and window > sent:
            size = min(len(pieces[0]), window - sent, self.frame_bytes)
            self.bytes += _FRAME_HEADER.pack(size << 8 | Frame.DATA, 0, stream_id)
            self.bytes += pieces[0][:size]
            sent += size
            if size == len(pieces[0]):
                pieces.popleft()
            else:
                pieces[0] = pieces[0][size:]
        self.window -= sent
        self._windows[stream] -= sent
        if not pieces:
            del self.waiting[stream]
