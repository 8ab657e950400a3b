"""Messages that wait for the store: their order, what lets them go, and what becomes of them where it stays away."""

import numpy as np
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper.held import Held
from google.rpc import status_pb2


class Outlet:
    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.ended = False

    def put(self, message: bytes) -> None:
        assert not self.ended
        self.messages.append(message)

    def close(self, status: status_pb2.Status | None = None) -> None:
        self.ended = True

    def fail(self, status: status_pb2.Status) -> None:
        self.ended = True


def held() -> tuple[Held, Outlet, list[Held]]:
    outlet, waits = Outlet(), []
    return Held(outlet, waits.append), outlet, waits


def result(handle: int, seq: int) -> bytes:
    return pb.StreamResponse(result=pb.StepResult(handle=handle, seq=seq)).SerializeToString()


def frame(handles: list[int], **fields: object) -> bytes:
    columns = [np.arange(2 * len(handles), dtype=np.float32).tobytes()]
    made = pb.ResultFrame(
        handles=np.array(handles, "<u4").tobytes(),
        seqs=np.arange(1, len(handles) + 1, dtype="<u8").tobytes(),
        columns=columns,
        **fields,
    )
    return pb.StreamResponse(frame=made).SerializeToString()


def parsed(messages: list[bytes]) -> list[pb.StreamResponse]:
    return [pb.StreamResponse.FromString(message) for message in messages]


def test_what_was_put_before_a_job_leaves_with_it_and_what_came_after_with_the_next() -> None:
    waiting, outlet, waits = held()
    waiting.put(b"1")
    waiting.put(b"2")
    waiting.mark(1)
    waiting.put(b"3")
    assert outlet.messages == []
    assert waits
    waiting.release(1)
    assert outlet.messages == [b"1", b"2"]
    waiting.mark(2)
    waiting.release(2)
    assert outlet.messages == [b"1", b"2", b"3"]


def test_a_job_that_failed_lets_nothing_go() -> None:
    waiting, outlet, _ = held()
    waiting.put(b"1")
    waiting.mark(1)
    waiting.unmark()
    waiting.release(1)
    assert outlet.messages == []
    waiting.mark(2)
    waiting.release(2)
    assert outlet.messages == [b"1"]


def test_the_end_comes_behind_what_waits() -> None:
    waiting, outlet, _ = held()
    waiting.put(b"1")
    waiting.close()
    waiting.put(b"never")
    assert not outlet.ended
    waiting.mark(1)
    waiting.release(1)
    assert outlet.messages == [b"1"]
    assert outlet.ended


def test_where_the_store_stays_away_answers_become_refusals_in_their_places() -> None:
    waiting, outlet, _ = held()
    attached = pb.StreamResponse(attached=pb.SessionAttached(handle=2)).SerializeToString()
    for message in (result(1, 7), attached, frame([1, 2])):
        waiting.put(message)
    waiting.mark(1)
    waiting.refuse(Fault(e.ERROR_REASON_STORE_UNAVAILABLE, "away", retry_s=1.0))
    error, same, errors = parsed(outlet.messages)
    assert (error.error.handle, error.error.seq) == (1, 7)
    assert from_status(error.error.status).reason == e.ERROR_REASON_STORE_UNAVAILABLE
    assert same.HasField("attached")
    assert np.frombuffer(errors.errors.handles, "<u4").tolist() == [1, 2]


def test_answers_of_a_session_that_is_gone_are_taken_out_and_no_others() -> None:
    waiting, outlet, _ = held()
    for message in (result(1, 1), result(2, 1), frame([1, 2, 1, 3], replayed_rows=np.array([0, 3], "<u4").tobytes())):
        waiting.put(message)
    waiting.mark(1)
    waiting.put(result(1, 2))
    waiting.drop(1)
    waiting.release(1)
    single, framed = parsed(outlet.messages)
    assert single.result.handle == 2
    assert np.frombuffer(framed.frame.handles, "<u4").tolist() == [2, 3]
    assert np.frombuffer(framed.frame.seqs, "<u8").tolist() == [2, 4]
    assert np.frombuffer(framed.frame.columns[0], np.float32).tolist() == [2.0, 3.0, 6.0, 7.0]
    assert np.frombuffer(framed.frame.replayed_rows, "<u4").tolist() == [1]
    assert len(waiting) == 0


def test_refusals_of_a_session_that_is_gone_are_taken_out_and_no_others() -> None:
    waiting, outlet, _ = held()
    errors = pb.StepErrorFrame(handles=np.array([1, 2, 1], "<u4").tobytes(), seqs=np.array([4, 5, 6], "<u8").tobytes())
    only = pb.StepErrorFrame(handles=np.uint32(1).tobytes(), seqs=np.uint64(7).tobytes())
    messages = [
        pb.StreamResponse(error=pb.StepError(handle=1, seq=3)),
        pb.StreamResponse(error=pb.StepError(handle=1)),
        pb.StreamResponse(error=pb.StepError(handle=2, seq=3)),
        pb.StreamResponse(errors=errors),
        pb.StreamResponse(errors=only),
    ]
    for message in messages:
        waiting.put(message.SerializeToString())
    waiting.drop(1)
    waiting.release_all()
    of_session, other, framed = parsed(outlet.messages)
    assert (of_session.error.handle, of_session.error.seq) == (1, 0)
    assert (other.error.handle, other.error.seq) == (2, 3)
    assert np.frombuffer(framed.errors.handles, "<u4").tolist() == [2]
    assert np.frombuffer(framed.errors.seqs, "<u8").tolist() == [5]


def test_a_frame_that_cannot_be_cut_is_refused_as_a_whole() -> None:
    waiting, outlet, _ = held()
    waiting.put(frame([1, 2], lengths=np.array([1, 1], "<u4").tobytes()))
    waiting.mark(1)
    waiting.drop(1)
    waiting.release(1)
    (errors,) = parsed(outlet.messages)
    assert np.frombuffer(errors.errors.handles, "<u4").tolist() == [1, 2]


def test_a_step_that_runs_when_its_session_is_lost_is_never_told_and_its_handle_can_be_used_again() -> None:
    waiting, outlet, _ = held()
    waiting.drop(1)
    waiting.put(result(1, 1))
    waiting.put(result(2, 1))
    waiting.put(frame([1, 2]))
    detached = pb.SessionDetached(handle=1, cause=pb.DETACH_CAUSE_TAKEN_OVER)
    waiting.put(pb.StreamResponse(detached=detached).SerializeToString())
    waiting.put(result(1, 7))
    waiting.release_all()
    other, framed, gone, next_of_handle = parsed(outlet.messages)
    assert (other.result.handle, gone.detached.handle) == (2, 1)
    assert np.frombuffer(framed.frame.handles, "<u4").tolist() == [2]
    assert (next_of_handle.result.handle, next_of_handle.result.seq) == (1, 7)
