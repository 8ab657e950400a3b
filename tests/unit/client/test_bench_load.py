"""A whole load against a peer of a few lines that speaks HTTP/2 by itself, and does whatever a test wants it to.

The peer keeps its own account of the windows that it gave, so a client that sends past one is found out.
"""

import contextlib
import socket
import ssl
import struct
import threading
from collections import defaultdict
from concurrent import futures

import grpc
import hpack
import numpy as np
import pytest
import trustme
from conveyor.bench import Load, LoadError, LoadSpec, Pattern
from conveyor.bench.arrivals import Arrivals
from conveyor.bench.http2 import PREFACE, Flag, Frame, Setting, frame, message, settings, window_update
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import spec_pb2, tensor_pb2

SERVICE = "conveyor.v1.SessionService"
INPUTS = [spec_pb2.TensorSpec(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[16], has_time=True)]
FAST_PATHS = ["plain", "trickle", "split", "joined", "padded"]


class Peer:
    """Answers steps on any number of connections.

    Attributes:
        form: how answers are cut into frames, one of FAST_PATHS.
        window: bytes that a client may send on a connection, and on a stream, until they are taken.
        refuse: seqs that are refused once, of every session.
        attached: sessions so far.
        closed: sessions that said goodbye, and streams that were half-closed.
        steps: what was applied: (connection, stream id, handle) -> values of each step.
        largest: rows of the largest frame.
        script: what to say instead of answering the n-th step: bytes from (stream id); None: nothing ever.
        ponged: a PING was answered.
    """

    def __init__(self, context=None):
        self.form = "plain"
        self.window = 65_535
        self.max_frame = 16_384
        self.refuse = set()
        self.framed_refusals = False
        self.headers = []
        self.attached = self.closed = self.half_closed = self.largest = self.count = 0
        self.ponged = threading.Event()
        self.wires = []
        self.most_sessions = 1_000_000
        self.steps = defaultdict(list)
        self.acked = defaultdict(int)
        self.script = {}
        self.failure = None
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        if self.failure is not None:
            raise self.failure

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                made, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(made,)))
                self._threads[-1].start()

    def _serve(self, made):
        try:
            with made, self._context.wrap_socket(made, server_side=True) if self._context else made as wire:
                _Wire(self, wire).serve()
        except (ConnectionError, ssl.SSLError):
            return
        except Exception as error:
            self.failure = error


class _Wire:
    """The peer's end of one connection."""

    def __init__(self, peer, wire):
        self.peer, self.wire = peer, wire
        peer.wires.append(wire)
        self.decoder, self.encoder = hpack.Decoder(), hpack.Encoder()
        self.windows = defaultdict(lambda: peer.window)
        # The connection's own begins at the size that HTTP/2 gives it, and is only ever widened.
        self.windows[0] = 65_535
        self.gathered = defaultdict(bytearray)
        self.applied = defaultdict(int)
        self.failed = {}
        self.out = []
        self.messages = defaultdict(bytes)

    def serve(self):
        values = {Setting.INITIAL_WINDOW_SIZE: self.peer.window, Setting.MAX_FRAME_SIZE: self.peer.max_frame}
        self.wire.sendall(settings(values))
        data = b""
        while len(data) < len(PREFACE):
            data += self.wire.recv(1 << 16)
        assert data.startswith(PREFACE)
        data = data[len(PREFACE) :]
        while True:
            data = data[self._take(data) :]
            self._say()
            more = self.wire.recv(1 << 16)
            if not more:
                return
            data += more

    def _take(self, data):
        at = 0
        while at + 9 <= len(data):
            word, flags, stream_id = struct.unpack_from(">IBI", data, at)
            end = at + 9 + (word >> 8)
            if end > len(data):
                break
            body = data[at + 9 : end]
            at = end
            match word & 0xFF:
                case Frame.HEADERS:
                    self.peer.headers.append(dict(self.decoder.decode(body)))
                    block = self.encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
                    self.out.append(frame(Frame.HEADERS, Flag.END_HEADERS, stream_id, block))
                case Frame.DATA:
                    self._data(flags, stream_id, body)
                case Frame.PING:
                    assert flags & Flag.ACK
                    self.peer.ponged.set()
        return at

    def _data(self, flags, stream_id, body):
        assert len(body) <= self.peer.max_frame
        for which in (0, stream_id):
            self.windows[which] -= len(body)
            assert self.windows[which] >= 0, f"window {which} was not kept"
        gathered = self.gathered[stream_id]
        gathered += body
        while len(gathered) >= 5 and len(gathered) >= 5 + int.from_bytes(gathered[1:5], "big"):
            size = 5 + int.from_bytes(gathered[1:5], "big")
            self._request(stream_id, pb.StreamRequest.FromString(bytes(gathered[5:size])))
            del gathered[:size]
        if body:
            for which in (0, stream_id):
                self.windows[which] += len(body)
                self.out.append(window_update(which, len(body)))
        if flags & Flag.END_STREAM:
            self.peer.half_closed += 1
            self._answer(stream_id, pb.StreamResponse(end=pb.StreamEnd()))
            self._say()
            block = self.encoder.encode([("grpc-status", "0")])
            self.out.append(frame(Frame.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream_id, block))

    def _request(self, stream_id, request):
        match request.WhichOneof("kind"):
            case "attach" if self.peer.attached == self.peer.most_sessions:
                status = to_status(Fault(e.ERROR_REASON_SESSIONS_EXHAUSTED, "full"))
                error = pb.StepError(handle=request.attach.handle, status=status)
                self._answer(stream_id, pb.StreamResponse(error=error))
            case "attach":
                self.peer.attached += 1
                info = pb.SessionInfo(session_id="s", max_in_flight=request.attach.options.max_in_flight)
                attached = pb.SessionAttached(handle=request.attach.handle, session=info)
                self._answer(stream_id, pb.StreamResponse(attached=attached))
            case "step":
                step = request.step
                self._step(stream_id, step.handle, step.seq, step.acked_seq, step.inputs[0].data)
            case "frame":
                handles = np.frombuffer(request.frame.handles, "<u4")
                seqs = np.frombuffer(request.frame.seqs, "<u8")
                acked = np.frombuffer(request.frame.acked_seqs or bytes(seqs.nbytes), "<u8")
                size = len(request.frame.columns[0]) // len(handles)
                self.peer.largest = max(self.peer.largest, len(handles))
                for row, (handle, seq) in enumerate(zip(handles.tolist(), seqs.tolist(), strict=True)):
                    value = request.frame.columns[0][row * size : (row + 1) * size]
                    self._step(stream_id, handle, seq, int(acked[row]), value, framed=True)
            case "close":
                self.peer.closed += 1

    def _step(self, stream_id, handle, seq, acked, value, framed=False):
        who = (id(self), stream_id, handle)
        self.peer.count += 1
        if self.peer.count in self.peer.script:
            said = self.peer.script[self.peer.count]
            if said is not None:
                self.out.append(said(stream_id))
            return
        if seq in self.peer.refuse and self.applied[who] == seq - 1 and (who, seq) not in self.failed:
            self.failed[who, seq] = True
            self._refuse(stream_id, handle, seq, e.ERROR_REASON_OVERLOADED, framed)
        elif seq != self.applied[who] + 1:
            assert (who, self.applied[who] + 1) in self.failed, f"step {seq} after {self.applied[who]}"
            self._refuse(stream_id, handle, seq, e.ERROR_REASON_STEP_ABORTED, framed)
        else:
            assert acked < seq
            self.peer.acked[who] = max(self.peer.acked[who], acked)
            self.applied[who] = seq
            self.peer.steps[who].append(value)
            if framed:
                handles, seqs = np.array([handle], "<u4").tobytes(), np.array([seq], "<u8").tobytes()
                self._answer(stream_id, pb.StreamResponse(frame=pb.ResultFrame(handles=handles, seqs=seqs)))
            else:
                outputs = [tensor_pb2.Tensor(name="y", data=value)]
                result = pb.StepResult(handle=handle, seq=seq, outputs=outputs)
                self._answer(stream_id, pb.StreamResponse(result=result))

    def _refuse(self, stream_id, handle, seq, reason, framed):
        status = to_status(Fault(reason, "no", {}, 0.001))
        response = pb.StreamResponse(error=pb.StepError(handle=handle, seq=seq, status=status))
        if framed and self.peer.framed_refusals:
            handles, seqs = np.array([handle], "<u4").tobytes(), np.array([seq], "<u8").tobytes()
            response = pb.StreamResponse(errors=pb.StepErrorFrame(handles=handles, seqs=seqs, status=status))
        self._answer(stream_id, response)

    def _answer(self, stream_id, response):
        self.messages[stream_id] += message(response.SerializeToString())
        if self.peer.form != "joined":
            self._cut(stream_id)

    def _cut(self, stream_id):
        data = self.messages.pop(stream_id)
        if self.peer.form == "split":
            self.out += [frame(Frame.DATA, 0, stream_id, data[at : at + 23]) for at in range(0, len(data), 23)]
        elif self.peer.form == "padded":
            self.out.append(frame(Frame.DATA, Flag.PADDED, stream_id, b"\x03" + data + bytes(3)))
        else:
            self.out.append(frame(Frame.DATA, 0, stream_id, data))

    def _say(self):
        for stream_id in list(self.messages):
            self._cut(stream_id)
        data = b"".join(self.out)
        self.out.clear()
        if self.peer.form == "trickle":
            for at in range(0, len(data), 11):
                self.wire.sendall(data[at : at + 11])
        elif data:
            self.wire.sendall(data)


@pytest.fixture
def start():
    """Starts peers that are gone, and have found nothing wrong, at the end of the test."""
    with contextlib.ExitStack() as stack:

        def started(context=None):
            peer = Peer(context)
            stack.callback(peer.stop)
            return peer

        yield started


@contextlib.contextmanager
def loaded(peer, **spec):
    load = Load(peer.target, LoadSpec(**{"model": "m", "answer_timeout_s": 10, **spec}), INPUTS)
    try:
        load.open()
        yield load
    finally:
        load.close()


def check(peer, result, spec, runs=1):
    """Every session was served, each step was applied once and with the session's own values, and all was counted."""
    assert result.steps == result.served.sum() == result.latency.count
    assert result.served.min() > 0
    assert result.active_streams == spec["streams"] == len(result.served_streams)
    assert sum(map(len, peer.steps.values())) >= result.steps + spec["sessions"]
    assert len(peer.steps) == spec["sessions"]
    for values in peer.steps.values():
        assert set(values) == {values[0]}
        assert len(values[0]) == 64 * spec.get("time_steps", 1)
    assert len({values[0] for values in peer.steps.values()}) == spec["sessions"]


SHAPES = {
    "one": {"sessions": 1, "streams": 1},
    "streams": {"sessions": 40, "streams": 40, "connections": 3},
    "pipelined": {"sessions": 12, "streams": 3, "connections": 2, "in_flight": 5},
    "frames": {"sessions": 12, "streams": 3, "connections": 2, "in_flight": 2, "frames": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FAST_PATHS)
def test_a_closed_loop_however_the_answers_are_cut(start, form, shape):
    peer, spec = start(), SHAPES[shape]
    peer.form = form
    with loaded(peer, **spec) as load:
        result = load.run(0.1)
        check(peer, result, spec)
        again = load.run(0.05)
        check(peer, again, spec)
    assert peer.attached == peer.closed == spec["sessions"]
    assert peer.half_closed == spec["streams"]
    assert all(peer.acked.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [Pattern.POISSON, Pattern.BURST])
def test_an_open_loop_keeps_its_rate(start, pattern, shape):
    peer, spec = start(), SHAPES[shape]
    with loaded(peer, **spec, pattern=pattern, rate_per_s=1000, burst_s=0.02) as load:
        result = load.run(0.5)
    assert 350 < result.steps + result.unsent < 650
    assert result.steps > 300
    assert result.latency.count == result.steps


@pytest.mark.parametrize("shed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [Pattern.POISSON, Pattern.BURST])
def test_what_falls_due_is_answered_refused_given_up_or_left_over(start, monkeypatch, pattern, shape, shed):
    """Nothing is lost and nothing counted twice, in each of two runs; all that was on its way came back."""
    peer, spec, due = start(), SHAPES[shape], []
    peer.refuse = {2, 5}

    def take(arrivals, now_ns):
        sessions, times = original(arrivals, now_ns)
        due.append(len(sessions))
        return sessions, times

    original = Arrivals._take
    monkeypatch.setattr(Arrivals, "_take", take)
    # A burst is more than the sessions may have on their way, however fast they are answered.
    rate = {"rate_per_s": 8000, "burst_s": 0.03}
    with loaded(peer, **spec, pattern=pattern, **rate, shed=shed) as load:
        for _ in range(2):
            result = load.run(0.1)
            refused = sum(took.count for took in result.refused.values())
            assert sum(due) == result.steps + refused + result.unsent + result.shed
            assert result.steps == result.latency.count == result.served.sum() > 0
            if shed:
                assert (result.unsent, result.unsent_oldest_s) == (0, 0.0)
                assert result.shed > 0 or pattern is Pattern.POISSON
            else:
                assert result.shed == 0
            due.clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_of_a_hundred_bytes_are_kept(start, shape):
    peer, spec = start(), {**SHAPES[shape], "time_steps": 7}
    peer.window = 100
    with loaded(peer, **spec) as load:
        check(peer, load.run(0.1), spec)


def test_messages_larger_than_any_frame_or_window(start):
    peer, spec = start(), {"sessions": 4, "streams": 2, "time_steps": 2000, "in_flight": 2}
    with loaded(peer, **spec) as load:
        check(peer, load.run(0.2), spec)


@pytest.mark.parametrize("framed", [False, True], ids=["one by one", "in columns"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", list(Pattern))
def test_a_session_goes_on_from_the_step_that_was_refused(start, pattern, shape, framed):
    peer, spec = start(), SHAPES[shape]
    peer.refuse, peer.framed_refusals = {1, 2, 3, 6}, framed
    with loaded(peer, **spec, pattern=pattern, rate_per_s=4000) as load:
        # Some ninety steps of each session, or some ten where others have the machine: past what is refused anyway.
        result = load.run(0.9)
    assert set(result.refused) <= {"OVERLOADED", "STEP_ABORTED"}
    assert result.refused["OVERLOADED"].count == 3 * spec["sessions"]
    assert result.latency.count == result.steps
    assert result.served.min() > 6
    check(peer, result, spec)


def test_pings_are_answered_between_runs_too(start):
    peer = start()
    with loaded(peer) as load:
        load.run(0.05)
        peer.wires[0].sendall(frame(Frame.PING, 0, 0, b"12345678"))
        while not peer.ponged.wait(0.01):
            load.tend()
        peer.ponged.clear()
        peer.wires[0].sendall(frame(Frame.PING, 0, 0, b"87654321"))
        assert load.run(0.05).steps > 0
        assert peer.ponged.wait(10)


def _said(**response):
    data = message(pb.StreamResponse(**response).SerializeToString())
    return lambda stream_id: frame(Frame.DATA, 0, stream_id, data)


def _trailers(stream_id):
    block = hpack.Encoder().encode([("grpc-status", "14"), ("grpc-message", "so long")])
    return frame(Frame.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream_id, block)


@pytest.mark.parametrize(
    ("says", "hears"),
    [
        (_trailers, "stream 0 ended .*14.*so long"),
        (lambda stream_id: frame(Frame.RST_STREAM, 0, stream_id, struct.pack(">I", 8)), "reset the stream"),
        (lambda _: frame(Frame.GOAWAY, 0, 0, struct.pack(">II", 1, 2)), "error 2"),
        (_said(go_away=pb.GoAway()), "go_away"),
        (_said(detached=pb.SessionDetached(handle=1)), "detached"),
        (_said(result=pb.StepResult(handle=2, seq=5)), "not attached"),
        (_said(result=pb.StepResult(handle=1, seq=9)), "step 9 where 5 was due"),
        (None, "silent|not answered"),
    ],
)
@pytest.mark.parametrize("frames", [False, True], ids=["steps", "frames"])
def test_what_ends_the_load_is_said(start, says, hears, frames):
    peer = start()
    peer.script = {5: says}
    with (
        loaded(peer, frames=frames, answer_timeout_s=0.3) as load,
        pytest.raises(LoadError, match=hears),
    ):
        load.run(5.0)


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
    load = Load(target, LoadSpec(model="m"), INPUTS)
    with pytest.raises(LoadError, match="cannot be reached"):
        load.open()
    with pytest.raises(LoadError, match="not open"):
        load.run(1)
    with pytest.raises(LoadError, match="HOST:PORT"):
        Load("localhost", LoadSpec(model="m"), INPUTS).open()


def test_the_call_is_one_of_grpc_and_says_when_it_wants_an_echo(start):
    peer = start()
    with loaded(peer, echo=True):
        pass
    (headers,) = peer.headers
    assert headers[":path"] == "/conveyor.v1.SessionService/Stream"
    assert headers[":scheme"] == "http"
    assert headers["content-type"] == "application/grpc"
    assert headers["te"] == "trailers"
    assert headers["conveyor-diagnostics"] == "echo"


@pytest.mark.parametrize("trusted", [True, False])
def test_encrypted(start, tmp_path, trusted):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    peer, spec = start(context), {"sessions": 6, "streams": 3, "connections": 2, "time_steps": 300}
    path = tmp_path / "ca.pem"
    (authority if trusted else trustme.CA()).cert_pem.write_to_path(path)
    if not trusted:
        with pytest.raises(LoadError, match=r"cannot be reached.*certificate"), loaded(peer, root_certificates=path):
            pass
        return
    with loaded(peer, **spec, root_certificates=path) as load:
        check(peer, load.run(0.2), spec)


def grpc_echo(credentials=None):
    """A server of grpcio's own that sends each message back, as the diagnostics of a Conveyor server do."""
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, _: requests)
    server = grpc.server(futures.ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Stream": handler})])
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("shape", SHAPES)
def test_grpc_s_own_server_understands_all_of_it(tmp_path, shape, encrypted):
    authority, path = trustme.CA(), None
    credentials = None
    if encrypted:
        path = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(path)
        identity = authority.issue_cert("127.0.0.1")
        pair = (identity.private_key_pem.bytes(), b"".join(blob.bytes() for blob in identity.cert_chain_pems))
        credentials = grpc.ssl_server_credentials([pair])
    server, target = grpc_echo(credentials)
    spec = LoadSpec(model="m", echo=True, root_certificates=path, time_steps=100, **SHAPES[shape])
    load = Load(target, spec, INPUTS)
    try:
        load.open()
        result = load.run(0.2)
        assert result.served.min() > 0
        assert result.steps == result.latency.count == result.served.sum()
    finally:
        load.close()
        server.stop(None).wait()


def test_a_load_that_is_refused_half_way_leaves_nothing_behind(start):
    peer = start()
    peer.most_sessions = 5
    load = Load(peer.target, LoadSpec(model="m", sessions=20, streams=10, connections=2, opening=3), INPUTS)
    with pytest.raises(LoadError, match="refused to attach") as caught:
        load.open()
    assert caught.value.reason == "SESSIONS_EXHAUSTED"
    load.close()
    assert peer.attached == 5
    # Those that were refused said goodbye too, to no one.
    assert 5 <= peer.closed < 20
    assert 3 <= peer.half_closed < 10
