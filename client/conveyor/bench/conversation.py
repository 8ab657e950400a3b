"""Steps go out and answers come in, on all streams of a process; which and when is for others to say.

Invariant: a turn costs a fixed number of array operations and two system calls for each connection with something to
say, however many messages it carries. What is not a plain result takes protobuf's way, one message at a time.
"""

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2
from google.rpc import status_pb2

from conveyor.bench.frame_codec import FrameEncoder, decode_frame
from conveyor.bench.histogram import Histogram
from conveyor.bench.http2 import FRAME_HEADER_BYTES
from conveyor.bench.inbox import Inbox
from conveyor.bench.ledger import Integers, Ledger
from conveyor.bench.model import Column
from conveyor.bench.result import LoadResult
from conveyor.bench.sockets import Sockets
from conveyor.bench.spec import LoadError, LoadSpec
from conveyor.bench.step_codec import StepDecoder, StepEncoder
from conveyor.bench.topology import Topology

_NONE: Integers = np.zeros(0, np.int64)


class Conversation:
    """All sessions' steps. Belongs to one thread.

    Args:
        sockets: connected, all sessions attached.
        spec: the load.
        topology: of its sessions.
        windows: as Connection's.
        columns: the inputs of a step.

    Attributes:
        ledger: what was sent and answered.
        resting: sessions that the server asked to wait, and until when (ns); for a closed loop to keep to.
    """

    def __init__(
        self, sockets: Sockets, spec: LoadSpec, topology: Topology, windows: Integers, columns: Sequence[Column]
    ) -> None:
        self.sockets = sockets
        self.topology = topology
        self.ledger = Ledger(spec.sessions, spec.in_flight)
        self.requests = 0
        self.resting: dict[int, int] = {}
        self._windows = windows
        self._wires = sockets.wires
        self._in_frames = spec.frames
        # Of each session whose stream, and of what lies before the first and behind the last that of none.
        self._owner = np.concatenate([[-1], topology.stream, [-1]])
        # A stream stands at most once in what is sent at a time.
        self._streams_once = spec.sessions == spec.streams and spec.in_flight == 1
        self._decoder = StepDecoder()
        # Of the turn that is being taken: when it came, what it counts for, who was answered.
        self._now_ns = 0
        self._result = LoadResult()
        self._answered: list[Integers] = []
        if spec.frames:
            self._frames = [
                FrameEncoder(
                    topology.sessions(stream), topology.handle[slice_of(topology, stream)], spec.time_steps, columns
                )
                for stream in range(spec.streams)
            ]
        else:
            first_stream = topology.first_stream[topology.connection]
            self._steps = StepEncoder(2 * (topology.stream - first_stream) + 1, topology.handle, columns)

    # ------------------------------------------------------------ out

    def send(self, sessions: Integers, times_ns: Integers | int) -> None:
        """Sends the next step of each session.

        Args:
            sessions: `[n]`, ascending; one may stand several times.
            times_ns: when the latency of each begins, `[n]` or one for all.
        """
        if sessions.size:
            seqs = self.ledger.send(sessions, times_ns)
            send = self._send_frames if self._in_frames else self._send_steps
            send(sessions, seqs, self.ledger.applied[sessions])

    def _send_steps(self, sessions: Integers, seqs: Integers, acked: Integers) -> None:
        frames, begins = self._steps.encode(sessions, seqs, acked)
        self.requests += len(sessions)
        streams = self.topology.stream[sessions]
        sizes = begins[1:] - begins[:-1] - FRAME_HEADER_BYTES
        largest = int(np.maximum.reduce(sizes))
        fits = self._take_windows(streams, sizes)
        for connection, begin, end in self._runs(sessions):
            wire = self._wires[connection]
            first, last = int(begins[begin]), int(begins[end])
            need = last - first - FRAME_HEADER_BYTES * (end - begin)
            peer = wire.connection.outlet
            if fits and not peer.waiting and need <= peer.window and largest <= peer.frame_bytes:
                peer.window -= need
                self.sockets.send(wire, frames.data[first:last])
                continue
            np.add.at(self._windows, streams[begin:end], sizes[begin:end])
            for row in range(begin, end):
                message = frames.data[int(begins[row]) + FRAME_HEADER_BYTES : int(begins[row + 1])]
                wire.connection.outlet.queue(int(streams[row]), message)
            self.sockets.send(wire)

    def _take_windows(self, streams: Integers, sizes: Integers) -> bool:
        """Takes what is to be sent from the streams' windows; False where one was not wide enough."""
        if self._streams_once:
            left = self._windows[streams] - sizes
            self._windows[streams] = left
        else:
            np.subtract.at(self._windows, streams, sizes)
            left = self._windows[streams]
        return int(np.minimum.reduce(left)) >= 0

    def _send_frames(self, sessions: Integers, seqs: Integers, acked: Integers) -> None:
        streams = self.topology.stream[sessions]
        cuts = [0, *(np.flatnonzero(streams[1:] != streams[:-1]) + 1).tolist(), len(streams)]
        touched = {}
        for begin, end in itertools.pairwise(cuts):
            stream = int(streams[begin])
            rows = slice(begin, end)
            message = self._frames[stream].encode(sessions[rows], seqs[rows], acked[rows])
            wire = self._wires[int(self.topology.connection[sessions[begin]])]
            wire.connection.outlet.queue(stream, message)
            touched[id(wire)] = wire
        self.requests += len(cuts) - 1
        for wire in touched.values():
            self.sockets.send(wire)

    def _runs(self, sessions: Integers) -> Iterator[tuple[int, int, int]]:
        """Connections, and where the sessions of each begin and end."""
        connections = self.topology.connection[sessions]
        if connections[0] == connections[-1]:
            return iter([(int(connections[0]), 0, len(sessions))])
        cuts = [0, *(np.flatnonzero(connections[1:] != connections[:-1]) + 1).tolist(), len(connections)]
        return zip(connections[cuts[:-1]].tolist(), cuts[:-1], cuts[1:], strict=True)

    # ------------------------------------------------------------ in

    def take(self, timeout_s: float, result: LoadResult) -> Integers:
        """Waits for answers, at most that long, and counts what came.

        Returns:
            The sessions that were answered, in order; one may stand several times. Empty: nothing came.

        Raises:
            LoadError: what came is no answer.
        """
        inbox = self.sockets.turn(timeout_s)
        self._now_ns, self._result, self._answered = time.perf_counter_ns(), result, []
        result.replies += len(inbox.offsets) + len(inbox.loose)
        self._take(inbox)
        if len(self._answered) == 1:
            return self._answered[0]
        return np.concatenate(self._answered) if self._answered else _NONE

    def _take(self, inbox: Inbox) -> None:
        inbox.check()
        if self._in_frames:
            for stream, message in inbox:
                self._take_one(stream, message)
            return
        done = 0
        for before, stream, data in inbox.loose:
            self._take_steps(inbox, done, before)
            self._take_one(stream, memoryview(data))
            done = before
        self._take_steps(inbox, done, len(inbox.offsets))

    def _take_steps(self, inbox: Inbox, begin: int, end: int) -> None:
        """Messages that lie in the inbox's buffer, by arrays."""
        if begin == end:
            return
        streams, handles, seqs, others = self._decoder.decode(inbox, begin, end)
        if streams.size:
            self._count(streams, handles, seqs)
        for index in others:
            self._take_one(inbox.streams[index], inbox.view(index))

    def _take_one(self, stream: int, message: memoryview) -> None:
        """One message, whatever it is."""
        frame = decode_frame(message)
        if frame is not None:
            handles, seqs = frame[0].astype(np.int64), frame[1].astype(np.int64)
            self._count(np.full(len(handles), stream), handles, seqs)
            return
        response = session_pb2.StreamResponse.FromString(bytes(message))
        kind = response.WhichOneof("kind")
        if kind == "result":
            handles, seqs = np.array([response.result.handle]), np.array([response.result.seq], np.int64)
            self._count(np.array([stream]), handles, seqs)
        elif kind == "error" and response.error.seq:
            self._refused(stream, [response.error.handle], [response.error.seq], response.error.status)
        elif kind == "errors":
            handles, seqs = np.frombuffer(response.errors.handles, "<u4"), np.frombuffer(response.errors.seqs, "<u8")
            self._refused(stream, handles.tolist(), seqs.tolist(), response.errors.status)
        else:
            raise LoadError(f"the server said, in the middle of the load: {response}")

    def _refused(self, stream: int, handles: Sequence[int], seqs: Sequence[int], status: status_pb2.Status) -> None:
        sessions = [self.topology.session(stream, handle) for handle in handles]
        if any(session not in self.topology.sessions(stream) for session in sessions):
            raise LoadError(f"the server refused a step of a handle that is not attached, up to {max(handles)}")
        took_ns = [self.ledger.fail(session, seq, self._now_ns) for session, seq in zip(sessions, seqs, strict=True)]
        fault = from_status(status)
        self._result.refused.setdefault(fault.reason_name, Histogram()).record(np.array(took_ns, np.int64))
        if fault.retry_s:
            self.resting.update(dict.fromkeys(sessions, self._now_ns + int(fault.retry_s * 1e9)))
        self._answered.append(np.array(sessions, np.int64))

    def _count(self, streams: Integers, handles: Integers, seqs: Integers) -> None:
        places = self.topology.first_session[streams] + handles
        if np.count_nonzero(self._owner.take(places, mode="clip") != streams):
            raise LoadError(f"the server answered for a handle that is not attached, up to {handles.max()}")
        sessions = places - 1
        self._result.latency.record(self.ledger.answer(sessions, seqs, self._now_ns))
        self._result.steps += len(sessions)
        self._answered.append(sessions)


def slice_of(topology: Topology, stream: int) -> slice:
    """The sessions of a stream, to index columns with."""
    sessions = topology.sessions(stream)
    return slice(sessions.start, sessions.stop)
