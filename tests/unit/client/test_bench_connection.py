"""HTTP/2 without I/O: whatever way the same messages are cut into frames and the frames into reads, they come out whole
and in order; and never is more sent than the windows allow."""

import struct

import hpack
import numpy as np
import pytest
from conveyor.bench import http2
from conveyor.bench.connection import Connection
from conveyor.bench.http2 import Flag, Frame, Setting
from conveyor.bench.inbox import Inbox
from conveyor.bench.outlet import Outlet
from conveyor.bench.spec import LoadError
from hypothesis import given, settings
from hypothesis import strategies as st

STREAMS = 5


class Feed:
    """A connection with open streams, fed with bytes as a socket would."""

    def __init__(self, first=2):
        self.windows = np.zeros(first + STREAMS, np.int64)
        self.connection = Connection(first, self.windows)
        for _ in range(STREAMS):
            self.connection.open(b"")
        self.inbox = Inbox(memoryview(bytearray(1 << 20)))
        self.messages = []
        self.ended = []
        self.tail = b""
        self.sent()

    def read(self, data):
        self.inbox.clear()
        data = self.tail + data
        # A turn reads several connections into one buffer.
        self.inbox.buffer[7 : 7 + len(data)] = data
        parsed = self.connection.receive(7, 7 + len(data), self.inbox)
        self.tail = data[parsed - 7 :]
        self.messages += [(stream, bytes(message)) for stream, message in self.inbox]
        self.ended += self.inbox.ended

    def sent(self):
        said = bytes(self.connection.outlet.bytes)
        self.connection.outlet.bytes.clear()
        return said


def frames_in(data):
    """(type, flags, stream id, body) of each frame."""
    found, at = [], 0
    while at < len(data):
        word, flags, stream_id = struct.unpack_from(">IBI", data, at)
        found.append((word & 0xFF, flags, stream_id, data[at + 9 : at + 9 + (word >> 8)]))
        at += 9 + (word >> 8)
    assert at == len(data)
    return found


def padded(stream_id, body, padding, flags=0):
    return http2.frame(Frame.DATA, flags | Flag.PADDED, stream_id, bytes([padding]) + body + bytes(padding))


@st.composite
def traffic(draw):
    """Bytes from a server; and the messages, increments and pings in them."""
    sizes = st.one_of(st.just(20), st.integers(0, 60))
    messages = draw(st.lists(st.tuples(st.integers(0, STREAMS - 1), sizes), max_size=60))
    expected, pending = [], dict.fromkeys(range(STREAMS), b"")
    out, increments, pings = b"", np.zeros(STREAMS + 1, np.int64), []
    for number, (stream, size) in enumerate(messages):
        body = bytes([number & 0xFF]) * size
        expected.append((stream, body))
        pending[stream] += http2.message(body)
        match draw(st.sampled_from(["plain", "plain", "plain", "later", "cut", "padded", "window", "ping"])):
            case "later":
                continue
            case "cut":
                cut = draw(st.integers(0, len(pending[stream])))
                out += http2.frame(Frame.DATA, 0, 2 * stream + 1, pending[stream][:cut])
                pending[stream] = pending[stream][cut:]
                continue
            case "padded":
                out += padded(2 * stream + 1, pending[stream], draw(st.integers(0, 5)))
            case "window":
                for _ in range(draw(st.sampled_from([1, 12]))):
                    which = draw(st.integers(0, STREAMS))
                    increments[which] += 10 + number
                    out += http2.window_update(2 * which - 1 if which else 0, 10 + number)
                out += http2.frame(Frame.DATA, 0, 2 * stream + 1, pending[stream])
            case "ping":
                pings.append(struct.pack(">Q", number))
                out += http2.frame(Frame.PING, 0, 0, pings[-1]) + http2.frame(Frame.PING, Flag.ACK, 0, bytes(8))
                out += http2.frame(Frame.DATA, 0, 2 * stream + 1, pending[stream])
            case _:
                out += http2.frame(Frame.DATA, 0, 2 * stream + 1, pending[stream])
        pending[stream] = b""
    for stream, rest in pending.items():
        out += http2.frame(Frame.DATA, 0, 2 * stream + 1, rest)
    return out, expected, increments, pings


@settings(max_examples=300, deadline=None)
@given(traffic(), st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_messages_come_out_whole_and_in_order_however_they_are_cut(given_traffic, reads):
    data, expected, increments, pings = given_traffic
    feed = Feed()
    at = turn = 0
    while at < len(data):
        size = reads[turn % len(reads)]
        feed.read(data[at : at + size])
        at, turn = at + size, turn + 1
    assert feed.tail == b""
    for stream in range(STREAMS):
        assert [m for s, m in feed.messages if s == 2 + stream] == [m for s, m in expected if s == stream]
    assert (feed.windows[2:] == http2.DEFAULT_WINDOW_BYTES + increments[1:]).all()
    assert feed.connection.outlet.window == http2.DEFAULT_WINDOW_BYTES + increments[0]
    assert [body for kind, flags, _, body in frames_in(feed.sent()) if (kind, flags) == (Frame.PING, Flag.ACK)] == pings


def test_a_long_run_of_equal_frames_gives_the_same_as_one_at_a_time():
    data = b"".join(
        http2.frame(Frame.DATA, 0, 2 * (n % STREAMS) + 1, http2.message(bytes([n]) * 30)) for n in range(100)
    )
    whole, single = Feed(), Feed()
    whole.read(data)
    for at in range(0, len(data), 44):
        single.read(data[at : at + 44])
    assert whole.messages == single.messages
    assert len(whole.messages) == 100


def test_settings_are_answered_and_change_the_windows_of_open_streams():
    feed = Feed()
    body = struct.pack(">HIHIHI", Setting.INITIAL_WINDOW_SIZE, 1000, Setting.MAX_FRAME_SIZE, 20_000, 3, 7)
    assert not feed.connection.settled
    feed.read(http2.frame(Frame.SETTINGS, 0, 0, body))
    assert feed.connection.settled
    assert feed.connection.max_streams == 7
    assert (feed.windows[2:] == 1000).all()
    assert frames_in(feed.sent()) == [(Frame.SETTINGS, Flag.ACK, 0, b"")]
    feed.read(http2.frame(Frame.SETTINGS, Flag.ACK, 0))
    assert feed.sent() == b""


def test_the_windows_that_the_server_sends_into_are_refilled(monkeypatch):
    monkeypatch.setattr("conveyor.bench.connection._CREDIT_EVERY_BYTES", 1000)
    feed = Feed()
    message = http2.message(bytes(95))
    for _ in range(9):
        feed.read(http2.frame(Frame.DATA, 0, 3, message))
    assert feed.sent() == b""
    feed.read(http2.frame(Frame.DATA, 0, 1, message))
    assert frames_in(feed.sent()) == [
        (Frame.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1000)),
        (Frame.WINDOW_UPDATE, 0, 3, struct.pack(">I", 900)),
    ]


def headers(fields, encoder=None):
    return (encoder or hpack.Encoder()).encode(fields)


def test_trailers_tell_the_status_of_a_stream():
    feed, encoder = Feed(), hpack.Encoder()
    feed.read(http2.frame(Frame.HEADERS, Flag.END_HEADERS, 1, headers([(":status", "200")], encoder)))
    assert feed.ended == []
    block = headers([("grpc-status", "14"), ("grpc-message", "going away"), ("x", "y" * 50)], encoder)
    first = http2.frame(Frame.HEADERS, Flag.END_STREAM, 1, block[:10])
    feed.read(first + http2.frame(Frame.CONTINUATION, Flag.END_HEADERS, 1, block[10:]))
    # The table of header fields goes on over streams.
    both = Flag.END_HEADERS | Flag.END_STREAM
    feed.read(http2.frame(Frame.HEADERS, both, 5, headers([("grpc-status", "14"), ("x", "y" * 50)], encoder)))
    assert feed.ended == [(2, 14, "going away"), (4, 14, "")]


@pytest.mark.parametrize(
    ("data", "stream", "says"),
    [
        (http2.frame(Frame.RST_STREAM, 0, 3, struct.pack(">I", 8)), 3, "reset the stream"),
        (http2.frame(Frame.HEADERS, Flag.END_HEADERS, 3, headers([(":status", "503")])), 3, "HTTP status 503"),
        (http2.frame(Frame.DATA, Flag.END_STREAM, 3), 3, "without a status"),
        (http2.frame(Frame.GOAWAY, 0, 0, struct.pack(">II", 7, 0)), 6, "no more streams"),
    ],
)
def test_a_stream_that_ends_otherwise(data, stream, says):
    feed = Feed()
    feed.read(data)
    ((ended, status, text),) = feed.ended
    assert (ended, status) == (stream, None)
    assert says in text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (http2.frame(Frame.GOAWAY, 0, 0, struct.pack(">II", 7, 11) + b"too_many_pings"), "error 11.*too_many_pings"),
        (http2.frame(Frame.DATA, 0, 99, http2.message(b"x")), "stream 99"),
        (http2.window_update(99, 5), "stream 99"),
        (http2.frame(Frame.DATA, 0, 1, b"\x01" + http2.message(b"x")[1:]), "compress"),
        (http2.frame(Frame.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff"), "headers"),
        (http2.frame(Frame.PUSH_PROMISE, 0, 1, bytes(4)), "pushes"),
    ],
)
def test_what_is_against_the_protocol_ends_the_load(data, says):
    with pytest.raises(LoadError, match=says):
        Feed().read(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_never_more_is_sent_than_the_windows_allow_and_all_of_it_in_the_end(data):
    windows = np.zeros(3, np.int64)
    outlet = Outlet(0, windows)
    for _ in range(3):
        outlet.open(b"")
    outlet.bytes.clear()
    outlet.window, windows[:] = 100, 60
    allowed = {0: 100, 1: 60, 3: 60, 5: 60}
    wanted, got = {1: b"", 3: b"", 5: b""}, {1: b"", 3: b"", 5: b""}

    def hear():
        for kind, _, stream_id, body in frames_in(bytes(outlet.bytes)):
            assert kind == Frame.DATA
            assert len(body) <= outlet.frame_bytes
            got[stream_id] += body
            for which in (0, stream_id):
                allowed[which] -= len(body)
                assert allowed[which] >= 0
        outlet.bytes.clear()

    outlet.frame_bytes = data.draw(st.sampled_from([7, 1000]))
    for number in range(data.draw(st.integers(1, 30))):
        which = data.draw(st.integers(-1, 2))
        if data.draw(st.booleans()):
            message = bytes([number]) * data.draw(st.integers(1, 50))
            wanted[2 * max(which, 0) + 1] += message
            outlet.queue(max(which, 0), message)
        else:
            allowed[2 * which + 1 if which >= 0 else 0] += 15
            outlet.widen(which if which >= 0 else None, 15)
        hear()
        assert all(wanted[stream_id].startswith(got[stream_id]) for stream_id in got)
    for stream in range(3):
        allowed[2 * stream + 1] += 2000
    allowed[0] += 6000
    outlet.widen_many(np.array([1, 0, 3, 5]), np.array([2000, 6000, 2000, 2000]))
    hear()
    assert got == wanted
    assert outlet.waiting == {}


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1), st.text("abc-/:", max_size=400)
        ),
        min_size=1,
    )
)
def test_headers_can_be_read_by_anyone(fields):
    assert [tuple(field) for field in hpack.Decoder(1 << 20).decode(http2.header_block(fields))] == fields


def test_the_greeting_is_what_rfc_9113_asks_for():
    said = http2.greeting()
    assert said.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    kinds = [kind for kind, *_ in frames_in(said[24:])]
    assert kinds == [Frame.SETTINGS, Frame.WINDOW_UPDATE]
    ((_, _, _, values), (_, _, stream_id, increment)) = frames_in(said[24:])
    assert dict(struct.iter_unpack(">HI", values)) == {2: 0, 4: 2**31 - 1}
    assert (stream_id, struct.unpack(">I", increment)[0] + 65_535) == (0, 2**31 - 1)
