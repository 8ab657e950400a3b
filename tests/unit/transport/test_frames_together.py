"""Frames that one stream sends within a turn: taken as one where they are alike, else one by one."""

import numpy as np
import pytest
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb

from tests.unit.transport.test_intake import FIRST, Paper, attach, step, told


class Gateway:
    """One stream with several sessions; what it receives before it is awaited comes in one turn."""

    def __init__(self, server, handles: int, models=("sum",), name="s") -> None:
        self.paper = Paper()
        self.messages = 0
        self.call = server.grpc._streams.enter(self.paper, {})
        for handle in range(handles):
            attach(self.call, self.paper, handle, models[handle % len(models)], f"{name}{handle}")

    def send(self, frame: pb.StepFrame) -> None:
        self.call.receive(pb.StreamRequest(frame=frame).SerializeToString())

    async def rows(self, count: int) -> list[tuple[int, int, object]]:
        """Handle, seq and total, or reason, of the next rows, in the order in which they come."""
        found: list[tuple[int, int, object]] = []
        while len(found) < count:
            (response,) = await self.paper.take(1)
            self.messages += 1
            if response.HasField("frame"):
                handles, seqs = (
                    np.frombuffer(response.frame.handles, np.uint32),
                    np.frombuffer(response.frame.seqs, np.uint64),
                )
                totals = np.frombuffer(response.frame.columns[1], np.float64)
                found += zip(handles.tolist(), seqs.tolist(), totals.tolist(), strict=True)
            elif response.HasField("errors"):
                handles, seqs = (
                    np.frombuffer(response.errors.handles, np.uint32),
                    np.frombuffer(response.errors.seqs, np.uint64),
                )
                reason = from_status(response.errors.status).reason
                found += [(handle, seq, reason) for handle, seq in zip(handles.tolist(), seqs.tolist(), strict=True)]
            else:
                found.append((response.error.handle, response.error.seq, from_status(response.error.status).reason))
        return found


@pytest.fixture(params=["compiled", "arrays"])
async def quick(request, make_server, wire_options, make_frame):
    server = await make_server(inline_run_s=10.0, wire=wire_options(compiled=request.param == "compiled"))
    # The compiled part takes a model's steps once it has seen one of them.
    first = Gateway(server, 2, models=("sum", "other"), name="first")
    for handle in range(2):
        first.send(make_frame([handle], [1], [[1.0]]))
        await first.rows(1)
    for runner in server.runners.values():
        runner.rows.clear()
    return server


def by_arrays(server) -> bool:
    return server.grpc._streams._intake._turns is None


async def test_frames_of_one_turn_are_one_run(quick, make_frame) -> None:
    gateway = Gateway(quick, 12)
    for start in range(0, 12, 4):
        gateway.send(make_frame(range(start, start + 4), [1] * 4, [[1.0]] * 4))
    assert await gateway.rows(12) == [(handle, 1, FIRST + 1) for handle in range(12)]
    assert quick.runner.rows == [12]
    # The compiled part answers each frame by one of its own.
    assert gateway.messages == (1 if by_arrays(quick) else 3)


async def test_a_session_in_several_of_them_takes_its_steps_in_order(quick, make_frame) -> None:
    gateway = Gateway(quick, 8)
    for seq in (1, 2, 3):
        gateway.send(make_frame(range(8), [seq] * 8, [[float(seq)]] * 8))
    rows = await gateway.rows(24)
    assert rows == [(h, seq, FIRST + sum(range(1, seq + 1))) for seq in (1, 2, 3) for h in range(8)]
    assert quick.runner.rows == [8, 8, 8]


async def test_steps_of_parked_frames_that_come_free_together_run_and_are_answered_together(quick, make_frame) -> None:
    """Handle 0 is in all of them; whatever is behind it follows in as few runs as its own order allows."""
    gateway = Gateway(quick, 6)
    gateway.send(make_frame([0, 1, 2], [1] * 3, [[1.0]] * 3))
    gateway.send(make_frame([0, 3], [2, 1], [[1.0]] * 2))
    gateway.send(make_frame([0, 1, 4], [3, 2, 1], [[1.0]] * 3))
    rows = await gateway.rows(8)
    assert sorted(rows) == [
        (0, 1, 11.0),
        (0, 2, 12.0),
        (0, 3, 13.0),
        (1, 1, 11.0),
        (1, 2, 12.0),
        (2, 1, 11.0),
        (3, 1, 11.0),
        (4, 1, 11.0),
    ]
    assert quick.runner.rows == [5, 2, 1]
    # By arrays, a frame for each run; else for what went of each message.
    assert gateway.messages == (3 if by_arrays(quick) else 6)


async def test_one_that_cannot_be_read_is_refused_by_itself(quick, make_frame) -> None:
    gateway = Gateway(quick, 4)
    bad = make_frame([2], [1], [[1.0]])
    bad.columns[0] += b"\0"
    gateway.send(make_frame([0, 1], [1] * 2, [[1.0]] * 2))
    gateway.send(bad)
    gateway.send(make_frame([3], [1], [[1.0]]))
    assert sorted(await gateway.rows(4), key=str) == [
        (0, 1, 11.0),
        (1, 1, 11.0),
        (2, 1, e.ERROR_REASON_INPUT_SIZE),
        (3, 1, 11.0),
    ]


async def test_frames_of_two_models_are_kept_apart(quick, make_frame) -> None:
    gateway = Gateway(quick, 4, models=("sum", "other"))
    gateway.send(make_frame([0, 2], [1] * 2, [[1.0]] * 2))
    gateway.send(make_frame([1, 3], [1] * 2, [[2.0]] * 2))
    assert sorted(await gateway.rows(4)) == [(0, 1, 11.0), (1, 1, 12.0), (2, 1, 11.0), (3, 1, 12.0)]
    assert quick.runners["sum"].rows == quick.runners["other"].rows == [2]


async def test_an_unknown_handle_concerns_its_row_alone(quick, make_frame) -> None:
    gateway = Gateway(quick, 2)
    gateway.send(make_frame([0], [1], [[1.0]]))
    gateway.send(make_frame([9, 1], [1, 1], [[1.0]] * 2))
    assert sorted(await gateway.rows(3), key=str) == [
        (0, 1, 11.0),
        (1, 1, 11.0),
        (9, 1, e.ERROR_REASON_HANDLE_UNKNOWN),
    ]


async def test_steps_and_frames_of_one_stream_keep_their_order(quick, make_frame) -> None:
    gateway = Gateway(quick, 2)
    gateway.call.receive(step(0, 1, 1.0))
    gateway.send(make_frame([0, 1], [2, 1], [[1.0]] * 2))
    gateway.call.receive(step(0, 3, 1.0))
    gateway.send(make_frame([0], [4], [[1.0]]))
    results, framed = [], []
    while len(results) + len(framed) < 5:
        (response,) = await gateway.paper.take(1)
        if response.HasField("frame"):
            framed += np.frombuffer(response.frame.columns[1], np.float64).tolist()
        else:
            results += told(response)
    assert results == [11.0, 13.0]
    assert sorted(framed) == [11.0, 12.0, 14.0]


async def test_what_comes_behind_frames_finds_them_taken(quick, make_frame) -> None:
    gateway = Gateway(quick, 2)
    gateway.send(make_frame([0, 1], [1] * 2, [[1.0]] * 2))
    gateway.call.receive(pb.StreamRequest(detach=pb.DetachSession(handle=0)).SerializeToString())
    gateway.call.half_close()
    kinds = [response.WhichOneof("kind") for response in await gateway.paper.take(4)]
    assert kinds.count("frame") == 1
    assert kinds.count("detached") == 2
    assert kinds[-1] == "end"


async def test_a_frame_that_ends_in_another_kind_is_of_that_kind(quick, make_frame) -> None:
    """Protobuf takes the last of several; nothing that came before may be left behind."""
    gateway = Gateway(quick, 2)
    gateway.call.receive(step(0, 1, 1.0))
    mixed = pb.StreamRequest(frame=make_frame([1], [1], [[1.0]])).SerializeToString()
    gateway.call.receive(mixed + pb.StreamRequest(close=pb.CloseAttachedSession(handle=0)).SerializeToString())
    first, second = await gateway.paper.take(2)
    assert told(first) == [11.0]
    assert (second.detached.handle, second.detached.applied_seq) == (0, 1)


async def test_frames_that_cannot_be_cut_into_rows_are_refused_wherever_their_sessions_come_again(
    quick, make_frame
) -> None:
    """They are alike in form, and have no whole number of bytes for a row."""
    gateway = Gateway(quick, 2)
    for seq in (1, 2):
        bad = make_frame([0, 1], [seq] * 2, [[1.0]] * 2)
        bad.columns[0] = bad.columns[0][:-1]
        gateway.send(bad)
    rows = await gateway.rows(4)
    assert sorted(row[:2] for row in rows) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {reason for _, _, reason in rows} <= {
        e.ERROR_REASON_INPUT_SIZE,
        e.ERROR_REASON_STEP_ABORTED,
        e.ERROR_REASON_STEP_GAP,
    }
    gateway.send(make_frame([0, 1], [1] * 2, [[1.0]] * 2))
    assert await gateway.rows(2) == [(0, 1, FIRST + 1), (1, 1, FIRST + 1)]


async def test_rows_that_wait_for_the_next_turn_go_with_what_comes_in_it(quick, make_frame) -> None:
    gateway = Gateway(quick, 6)
    gateway.send(make_frame(range(4), [1] * 4, [[1.0]] * 4))
    gateway.send(make_frame([0, 1, 4, 5], [2, 2, 1, 1], [[1.0]] * 4))
    rows = await gateway.rows(6)
    gateway.send(make_frame(range(2, 4), [2] * 2, [[1.0]] * 2))
    rows += await gateway.rows(10 - len(rows))
    assert sorted(rows) == sorted(
        [*((handle, 1, 11.0) for handle in range(6)), *((handle, 2, 12.0) for handle in range(4))]
    )
    assert quick.runner.rows[0] == 6
    assert sum(quick.runner.rows) == 10
