"""How streams are opened and sessions attached, and how both are ended in order.

Invariant: at most so many attaches are unanswered as the load's spec says, so that opening many streams is not itself
the load.
"""

import time
from collections import deque
from collections.abc import Iterator

from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2

from conveyor.bench import http2
from conveyor.bench.inbox import Inbox
from conveyor.bench.sockets import Sockets
from conveyor.bench.spec import LoadError, LoadSpec
from conveyor.bench.topology import Topology

PATH = "/conveyor.v1.SessionService/Stream"
# A server that is away, or slow to end its streams, is not waited for longer.
_CLOSE_TIMEOUT_S = 5.0


class Opening:
    """Opens all streams and attaches all sessions; ends them again.

    Args:
        sockets: connected.
        spec: the load.
        topology: of its sessions.
        authority: what the streams are asked from.
    """

    def __init__(self, sockets: Sockets, spec: LoadSpec, topology: Topology, authority: str) -> None:
        self._sockets = sockets
        self._spec = spec
        self._topology = topology
        scheme = "http" if spec.root_certificates is None else "https"
        self._headers = http2.request_headers(authority, PATH, scheme, spec.metadata)
        self._unanswered = 0

    def open(self) -> None:
        """Returns once every session is attached.

        Raises:
            LoadError: the server refused one, or was silent.
        """
        self._settle()
        sessions = deque(self._sessions())
        while sessions or self._unanswered:
            while sessions and self._unanswered < self._spec.opening:
                self._attach(*sessions.popleft())
            for wire in self._sockets.wires:
                if wire.connection.outlet.bytes:
                    self._sockets.send(wire)
            self._take()

    def _settle(self) -> None:
        """Waits for each server's settings: how many streams it takes."""
        patience = Patience(self._spec.answer_timeout_s)
        while not all(wire.connection.settled for wire in self._sockets.wires):
            patience.check(self._sockets.turn(0.1), "the server says nothing")
        for index, wire in enumerate(self._sockets.wires):
            streams = len(self._topology.streams(index))
            if streams > wire.connection.max_streams:
                limit = wire.connection.max_streams
                raise LoadError(f"the server takes {limit} streams on a connection, not {streams}: use more of them")

    def _sessions(self) -> Iterator[tuple[int, int, int]]:
        """Connection, stream and handle of each session: all connections begin at once, and none is done first."""
        topology, count = self._topology, self._spec.connections
        for place in range(max(len(topology.streams(connection)) for connection in range(count))):
            for connection in range(count):
                streams = topology.streams(connection)
                if place < len(streams):
                    for handle in range(1, len(topology.sessions(streams[place])) + 1):
                        yield connection, streams[place], handle

    def _attach(self, connection: int, stream: int, handle: int) -> None:
        wire = self._sockets.wires[connection]
        if handle == 1:
            wire.connection.open(self._headers)
        attach = session_pb2.AttachSession(
            handle=handle,
            mode=session_pb2.AttachSession.MODE_CREATE,
            model=self._spec.model,
            version=self._spec.version,
            options=session_pb2.SessionOptions(max_in_flight=self._spec.in_flight),
        )
        request = session_pb2.StreamRequest(attach=attach)
        wire.connection.outlet.queue(stream, http2.message(request.SerializeToString()))
        self._unanswered += 1

    def _take(self) -> None:
        patience = Patience(self._spec.answer_timeout_s)
        while self._unanswered:
            inbox = self._sockets.turn(0.1)
            patience.check(inbox, f"{self._unanswered} attaches were not answered")
            answers = list(inbox)
            for _, message in answers:
                self._attached(session_pb2.StreamResponse.FromString(bytes(message)))
            if answers:
                return

    def _attached(self, response: session_pb2.StreamResponse) -> None:
        if response.WhichOneof("kind") == "error":
            fault = from_status(response.error.status)
            raise LoadError(f"the server refused to attach a session: {fault.message}", reason=fault.reason_name)
        if response.WhichOneof("kind") != "attached":
            raise LoadError(f"the server answered an attach by {response}")
        granted = response.attached.session.max_in_flight
        if not self._spec.echo and granted < self._spec.in_flight:
            raise LoadError(f"the server lets a session have {granted} steps unanswered, not {self._spec.in_flight}")
        self._unanswered -= 1

    def close(self) -> None:
        """Closes all sessions and ends all streams that were opened. A server that is away is no error."""
        try:
            self._say_farewell()
            self._hear_out()
        except LoadError:
            return

    def _say_farewell(self) -> None:
        for connection, stream, handle in self._sessions():
            wire = self._sockets.wires[connection]
            if stream not in self._opened(connection):
                continue
            request = session_pb2.StreamRequest(close=session_pb2.CloseAttachedSession(handle=handle))
            wire.connection.outlet.queue(stream, http2.message(request.SerializeToString()))

    def _opened(self, connection: int) -> range:
        """The streams of a connection that were opened."""
        return self._topology.streams(connection)[: self._sockets.wires[connection].connection.outlet.opened]

    def _hear_out(self) -> None:
        """Half-closes each stream once all that was said on it is on its way, and waits for the server's last word."""
        end = time.monotonic() + _CLOSE_TIMEOUT_S
        speaking = {stream for index in range(self._spec.connections) for stream in self._opened(index)}
        listening = set(speaking)
        while listening and time.monotonic() < end:
            for index, wire in enumerate(self._sockets.wires):
                for stream in speaking.intersection(self._topology.streams(index)):
                    if stream not in wire.connection.outlet.waiting:
                        wire.connection.outlet.half_close(stream)
                        speaking.discard(stream)
                if wire.connection.outlet.bytes:
                    self._sockets.send(wire)
            listening -= {stream for stream, _, _ in self._sockets.turn(0.1).ended}


class Patience:
    """Gives up when nothing comes for too long. Made anew whenever something came."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def check(self, inbox: Inbox, waiting_for: str) -> None:
        """Raises LoadError where a stream ended, or the time is up."""
        inbox.check()
        if time.monotonic() > self._end:
            raise LoadError(f"{waiting_for} for {self._timeout_s:g} s")
