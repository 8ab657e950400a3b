"""What happens to sessions in a turn is known before the steps of that turn are read: rows are given away at once."""

import numpy as np
import pytest
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.store.contract import Claim, Missing, Record
from conveyor_server.store.memory import MemoryStore
from conveyor_server.transport.stream import StreamCall
from replicas import FRESH, MODEL, Clock, Replica, Sink

CREATE, RESUME = pb.AttachSession.MODE_CREATE, pb.AttachSession.MODE_RESUME


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replica(clock: Clock) -> Replica:
    """With room for two sessions in memory."""
    return Replica(clock, MemoryStore(lambda: clock.now), at_once=True, max_sessions=2)


def attach(call: StreamCall, handle: int, name: str, mode: pb.AttachSession.Mode.ValueType = CREATE) -> None:
    attach = pb.AttachSession(mode=mode, handle=handle, session_id=name, model=MODEL)
    call.receive(pb.StreamRequest(attach=attach).SerializeToString())


def frame(call: StreamCall, handles: list[int], seq: int, values: list[float]) -> None:
    frame = pb.StepFrame(
        handles=np.array(handles, "<u4").tobytes(),
        seqs=np.full(len(handles), seq, "<u8").tobytes(),
        columns=[np.array(values).tobytes()],
    )
    call.receive(pb.StreamRequest(frame=frame).SerializeToString())


def settle(replica: Replica, clock: Clock) -> None:
    """All is written, and nobody has come in lately."""
    for _ in range(10):
        clock.now += 0.1
        replica.turn()
        while replica.store_thread:
            replica.visit()
            replica.turn()


def told(sink: Sink) -> list[tuple[str, dict[int, float]]]:
    """Kinds of what was said since the last call, and of frames the totals by handle."""
    messages, sink.messages = [pb.StreamResponse.FromString(message) for message in sink.messages], []
    said = []
    for message in messages:
        handles = np.frombuffer(message.frame.handles, "<u4").tolist()
        totals = np.frombuffer(b"".join(message.frame.columns)).tolist()
        said.append((str(message.WhichOneof("kind")), dict(zip(handles, totals, strict=True))))
    return said


def test_a_frame_that_comes_when_its_sessions_have_just_left_memory_wakes_them(replica: Replica, clock: Clock) -> None:
    call, sink = replica.stream()
    attach(call, 1, "a")
    attach(call, 2, "b")
    settle(replica, clock)
    frame(call, [1, 2], 1, [1.0, 2.0])
    settle(replica, clock)
    told(sink)
    clock.now += 1.2
    replica.turn()
    clock.now += 0.9
    # Both are idle for long enough; nobody was told yet.
    replica.beat._turn()
    assert set(replica.directory.asleep) == {"a", "b"}
    frame(call, [1, 2], 2, [4.0, 8.0])
    settle(replica, clock)
    assert told(sink) == [("frame", {1: FRESH + 5, 2: FRESH + 10})]
    replica.crash()


def test_no_step_goes_to_a_session_that_has_the_row_of_one_that_has_just_left(replica: Replica, clock: Clock) -> None:
    call, sink = replica.stream()
    attach(call, 1, "a")
    settle(replica, clock)
    frame(call, [1], 1, [4.0])
    replica.turn()
    row = replica.directory.sessions["a"].row
    assert told(sink)[-1] == ("frame", {1: FRESH + 4})
    [taken] = replica.store.inner.take([Claim("a", "another", "a runtime", clock.now + 60)])
    assert isinstance(taken, Record)
    # In one visit to the store, the one is found to be another's and the other is made.
    clock.now += 0.5
    attach(call, 2, "b")
    replica.turn()
    replica.visit()
    frame(call, [1], 1, [4.0])
    replica.turn()
    assert replica.directory.sessions["b"].row == row
    # What was recorded of the one may be told still; of the other nothing has moved.
    assert {kind for kind, _ in told(sink)} >= {"attached", "detached"}
    frame(call, [2], 1, [8.0])
    replica.turn()
    assert told(sink) == [("frame", {2: FRESH + 8})]
    replica.crash()


def test_a_session_that_closes_while_it_is_asked_for_keeps_its_step_until_it_is_closed(clock: Clock) -> None:
    replica = Replica(clock, MemoryStore(lambda: clock.now))
    call, sink = replica.stream()
    attach(call, 1, "a")
    settle(replica, clock)
    told(sink)
    frame(call, [1], 1, [4.0])
    replica.turn()
    attach(call, 2, "a", RESUME)
    replica.turn()
    call.receive(pb.StreamRequest(close=pb.CloseAttachedSession(handle=1)).SerializeToString())
    replica.turn()
    # The store gives the session to whoever asked; its step is not done.
    replica.visit()
    replica.turn()
    replica.run()
    settle(replica, clock)
    by_kind = {}
    for message in map(pb.StreamResponse.FromString, sink.messages):
        kind = message.WhichOneof("kind")
        by_kind.setdefault(kind, []).append(getattr(message, kind))
    [refused] = by_kind["error"]
    assert (refused.handle, from_status(refused.status).reason) == (2, e.ERROR_REASON_SESSION_CLOSED)
    [result] = by_kind["frame"]
    assert np.frombuffer(b"".join(result.columns)).tolist() == [FRESH + 4]
    [detached] = by_kind["detached"]
    assert (detached.handle, detached.cause) == (1, pb.DETACH_CAUSE_CLOSED)
    assert replica.directory.sessions == {}
    [left] = replica.store.inner.take([Claim("a", "another", "a runtime", clock.now + 60)])
    assert isinstance(left, Missing)
    replica.crash()
