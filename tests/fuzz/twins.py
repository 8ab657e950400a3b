"""A stream of a whole server, fed with anything: once with the compiled part, and once without.

Invariant: both tell the client the same, whatever it sends; a neighbour's step is answered after each message, and no
session is lost. Two servers of one clock, with all that a server has but sockets and threads (tests/support/replicas).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from conveyor_proto.codec import encode
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2
from conveyor_server import compiled
from conveyor_server.sessions import roster
from conveyor_server.store.memory import MemoryStore
from conveyor_server.transport.intake import Intake
from conveyor_server.transport.stream import StreamCall
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from replicas import MODEL, Clock, Replica, Sink

# Inputs after which both begin anew: sessions that were made up on the way would fill them.
_LIFE = 256
# What is no message at all ends the call, always the same way and slowly: one in so many is enough.
_BROKEN = 16
# Numbers of StreamRequest's fields.
_KINDS = range(1, 7)


def messages() -> list[bytes]:
    """Good messages of every kind."""
    one, two = encode(np.ones((1, 1))), encode(np.ones((2, 1)))
    made = [
        pb.StreamRequest(step=pb.Step(handle=1, seq=1, inputs=[one])),
        pb.StreamRequest(step=pb.Step(handle=2, seq=1, inputs=[two], timeout_ms=5, acked_seq=1)),
        pb.StreamRequest(step=pb.Step(handle=1, seq=2, inputs=[tensor_pb2.Tensor(data=bytes(8))])),
        pb.StreamRequest(frame=_frame([1, 2], [1, 1], [1, 1])),
        pb.StreamRequest(frame=_frame([1, 2], [2, 2], [3, 2])),
        pb.StreamRequest(attach=pb.AttachSession(handle=3, mode=pb.AttachSession.MODE_CREATE, model=MODEL)),
        pb.StreamRequest(
            attach=pb.AttachSession(handle=4, mode=pb.AttachSession.MODE_RESUME, session_id="s1", answered_seq=1)
        ),
        pb.StreamRequest(detach=pb.DetachSession(handle=2)),
        pb.StreamRequest(close=pb.CloseAttachedSession(handle=1)),
        pb.StreamRequest(flush=pb.FlushSession(handle=1)),
    ]
    whole = [item.SerializeToString() for item in made]
    # Each as its kind and its content, too.
    parts = [bytes((kind.number,)) + value.SerializeToString() for item in made for kind, value in item.ListFields()]
    return [*whole, *parts]


def _frame(handles: Sequence[int], seqs: Sequence[int], lengths: Sequence[int]) -> pb.StepFrame:
    return pb.StepFrame(
        handles=np.array(handles, np.uint32).tobytes(),
        seqs=np.array(seqs, np.uint64).tobytes(),
        lengths=b"" if set(lengths) == {1} else np.array(lengths, np.uint32).tobytes(),
        columns=[np.ones(sum(lengths)).tobytes()],
    )


class Different(Exception):
    """The two told their clients different things; what led there is in the message."""

    def __init__(self, history: Sequence[bytes], first: Sequence[str], second: Sequence[str]) -> None:
        fed = "\n".join(data.hex() for data in history)
        super().__init__(f"after\n{fed}\none said\n{first}\nand the other\n{second}")


class Paper(Sink):
    """Where a stream's messages go; one that is failed says so."""

    def fail(self, status: Any) -> None:
        self.messages.append(b"failed: " + status.SerializeToString())


class _Server:
    """One of the two."""

    def __init__(self, *, use_compiled: bool) -> None:
        self.replica = Replica(Clock(), MemoryStore(), at_once=True, max_sessions=12)
        self.replica.driver.store = None
        self.replica.intake = Intake(self.replica.driver, self.replica.metrics, use_compiled=use_compiled)
        self.replica.driver.before_turns(self.replica.intake.take)
        self.stream, self.paper = self._stream(2)
        self.neighbour, self.told = self._stream(1, "n")
        self.seq = 0

    def reopen(self) -> None:
        """The stream has failed; another one goes on with its sessions."""
        self.stream.broken()
        self.replica.turn()
        self.stream, self.paper = self._stream(2)

    def _stream(self, sessions: int, name: str = "s") -> tuple[Any, Paper]:
        replica, paper = self.replica, Paper()
        call = StreamCall(replica.driver, paper, replica.metrics, replica.intake)
        for handle in range(1, sessions + 1):
            attach = pb.AttachSession(
                handle=handle, mode=pb.AttachSession.MODE_RESUME_OR_CREATE, model=MODEL, session_id=f"{name}{handle}"
            )
            self._say(call, attach=attach)
        return call, paper

    def _say(self, call: Any, **kind: Any) -> None:
        call.receive(pb.StreamRequest(**kind).SerializeToString())
        self.replica.turn()

    def feed(self, data: bytes) -> list[bytes]:
        """What the client is told of a message."""
        self.paper.messages.clear()
        self.stream.receive(data)
        self.replica.turn()
        return list(self.paper.messages)

    def step_neighbour(self) -> None:
        self.seq += 1
        self.told.messages.clear()
        self._say(self.neighbour, step=pb.Step(handle=1, seq=self.seq, inputs=[encode(np.ones((1, 1)))]))
        (answer,) = [pb.StreamResponse.FromString(data) for data in self.told.messages]
        assert answer.result.seq == self.seq, answer

    def end(self) -> None:
        self.replica.crash()


class Chance:
    """Ids that both servers draw, the same for the same message."""

    def __init__(self) -> None:
        self.drawn = 0

    def token_hex(self, size: int) -> str:
        """See secrets.token_hex."""
        self.drawn += 1
        return f"{self.drawn:0{2 * size}x}"


class Twins:
    """Both of them."""

    def __init__(self) -> None:
        self._chance = roster.secrets = Chance()  # type: ignore[assignment]
        self._servers: tuple[_Server, ...] = ()
        self._fed = 0
        # What both were fed, as it was told from where they began.
        self._history: list[bytes] = []

    def run(self, data: bytes) -> str:
        """Feeds both, and compares; see targets.Target.

        The first byte says which kind of request the others are the content of, or that they are a whole request.
        """
        if self._fed % _LIFE == 0:
            for server in self._servers:
                server.end()
            self._history.clear()
            self._servers = tuple(_Server(use_compiled=way) for way in (compiled.BUILT, False))
        self._fed += 1
        if data and data[0] in _KINDS:
            data = bytes((data[0] << 3 | 2,)) + _varint(len(data) - 1) + data[1:]
        if self._fed % _BROKEN and not _is_message(data):
            return "no message"
        self._history.append(data)
        told, drawn = [], self._chance.drawn
        for server in self._servers:
            self._chance.drawn = drawn
            told.append(server.feed(data))
        first, second = (_texts(each) for each in told)
        if first != second:
            raise Different(self._history, first, second)
        for server in self._servers:
            server.step_neighbour()
        if any(message.startswith(b"failed") for message in told[0]):
            for server in self._servers:
                server.reopen()
            return "call ended"
        kinds = [pb.StreamResponse.FromString(message).WhichOneof("kind") for message in told[0]]
        return " ".join(dict.fromkeys(map(str, kinds))) or "nothing"


def _is_message(data: bytes) -> bool:
    try:
        pb.StreamRequest.FromString(data)
    except DecodeError:
        return False
    return True


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def _texts(told: Sequence[bytes]) -> list[str]:
    """What is told, in an order and form of its own: answers of one turn may come in one message or in several."""
    lines: list[str] = []
    for data in told:
        if data.startswith(b"failed"):
            lines.append(repr(data))
        else:
            lines.append(str(_in_order(pb.StreamResponse.FromString(data))))
    return sorted(lines)


def _in_order(told: pb.StreamResponse) -> pb.StreamResponse:
    """The same, with the metadata of a refusal in one order: protobuf's maps have none."""
    for kind in ("error", "errors"):
        if told.HasField(kind):
            for detail in getattr(told, kind).status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    detail.value = info.SerializeToString(deterministic=True)
    return told
