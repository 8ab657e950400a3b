"""Columnar frames: many sessions in one message, each row on its own."""

import numpy as np
import pytest
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server import frame_inputs
from conveyor_server.transport import result_wire


def columns(frame: pb.ResultFrame) -> dict[int, tuple[int, list[float], float]]:
    """Handle -> seq, totals, last."""
    handles = np.frombuffer(frame.handles, np.uint32).tolist()
    seqs = np.frombuffer(frame.seqs, np.uint64).tolist()
    lengths = np.frombuffer(frame.lengths, np.uint32).tolist() or [1] * len(handles)
    total, last = (np.frombuffer(column, np.float64) for column in frame.columns)
    assert len(total) == sum(lengths)
    parts = np.split(total, np.cumsum(lengths)[:-1])
    return {
        handle: (seq, part.tolist(), end)
        for handle, seq, part, end in zip(handles, seqs, parts, last.tolist(), strict=True)
    }


async def attach_all(stream, count: int) -> None:
    for handle in range(count):
        await stream.attached(handle)


async def collect(stream, rows: int) -> tuple[dict, dict]:
    """The next answers: results by handle, and faults by handle."""
    results, faults = {}, {}
    while len(results) + len(faults) < rows:
        response = await stream.receive()
        if response.HasField("frame"):
            results |= columns(response.frame)
        else:
            faults[response.error.handle] = response.error
    return results, faults


async def in_order(stream, rows: int) -> list[tuple[int, int, float]]:
    """Handle, seq and last of the next rows, as they come."""
    got: list[tuple[int, int, float]] = []
    while len(got) < rows:
        frame = await stream.expect("frame")
        handles = np.frombuffer(frame.handles, np.uint32).tolist()
        seqs = np.frombuffer(frame.seqs, np.uint64).tolist()
        got += zip(handles, seqs, np.frombuffer(frame.columns[1], np.float64).tolist(), strict=True)
    return got


async def test_one_frame_is_one_batch_and_one_answer(server) -> None:
    stream = server.stream()
    await attach_all(stream, 40)
    await stream.frame(range(40), [1] * 40, [[float(row)] for row in range(40)])
    frame = await stream.expect("frame")
    assert frame.lengths == frame.replayed_rows == b""
    assert columns(frame) == {row: (1, [10.0 + row], 10.0 + row) for row in range(40)}
    assert server.runner.rows == [40]
    await stream.end()


async def test_rows_of_different_lengths(server) -> None:
    stream = server.stream()
    await attach_all(stream, 4)
    rows = [[1.0], [1.0, 2.0, 3.0], [1.0] * 20, [5.0, 5.0]]
    await stream.frame(range(4), [1] * 4, rows)
    results, faults = await collect(stream, 4)
    assert not faults
    assert results == {
        row: (1, (10.0 + np.cumsum(values)).tolist(), 10.0 + sum(values)) for row, values in enumerate(rows)
    }
    await stream.end()


async def test_a_bad_row_fails_alone(server, make_frame) -> None:
    stream = server.stream()
    await attach_all(stream, 4)
    await stream.frame([0, 1, 77, 2, 3], [1, 5, 1, 1, 1], [[1.0], [1.0], [1.0], [float("nan")], [4.0]])
    results, faults = await collect(stream, 5)
    assert results == {0: (1, [11.0], 11.0), 3: (1, [14.0], 14.0)}
    assert {handle: error.status.code for handle, error in faults.items()} == {1: 11, 77: 3, 2: 3}
    await stream.frame([1, 2], [1, 1], [[1.0], [2.0]])
    results, faults = await collect(stream, 2)
    assert results == {1: (1, [11.0], 11.0), 2: (1, [12.0], 12.0)}
    await stream.end()


async def test_a_frame_refused_as_a_whole_counts_for_every_row(server, make_frame) -> None:
    stream = server.stream()
    await attach_all(stream, 3)
    await stream.send(frame=make_frame([0, 1, 2], [1, 1, 1], [[1.0], [2.0]]))
    for handle in range(3):
        got, seq, fault = await stream.fault()
        assert (got, seq, fault.reason) == (handle, 1, e.ERROR_REASON_INPUT_SIZE)
    # Numbering took account of it: what was pipelined behind is aborted until seq 1 is there.
    await stream.frame([0, 1, 2], [2, 2, 2], [[1.0]] * 3)
    aborted = await stream.expect("errors")
    assert np.frombuffer(aborted.handles, np.uint32).tolist() == [0, 1, 2]
    assert from_status(aborted.status).reason == e.ERROR_REASON_STEP_ABORTED
    await stream.frame([0, 1, 2], [1, 1, 1], [[1.0]] * 3)
    results, faults = await collect(stream, 3)
    assert (len(results), faults) == (3, {})
    await stream.end()


@pytest.mark.parametrize(
    "frame",
    [
        pb.StepFrame(),
        pb.StepFrame(handles=b"abc"),
        pb.StepFrame(handles=bytes(8), seqs=bytes(8)),
        pb.StepFrame(handles=bytes(4 * (frame_inputs.MAX_ROWS + 1)), seqs=bytes(8 * (frame_inputs.MAX_ROWS + 1))),
    ],
    ids=["empty", "cut handles", "seqs of other rows", "too many rows"],
)
async def test_a_frame_whose_numbers_cannot_be_read(server, frame) -> None:
    stream = server.stream()
    await attach_all(stream, 1)
    await stream.send(frame=frame)
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (0, 0, e.ERROR_REASON_FRAME_INVALID)
    assert await stream.answer(0, 1, 1.0) == [11.0]
    await stream.end()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"lengths": b"123"}, e.ERROR_REASON_FRAME_INVALID),
        ({"acked_seqs": b"123"}, e.ERROR_REASON_FRAME_INVALID),
        ({"columns": []}, e.ERROR_REASON_INPUT_MISSING),
        ({"columns": [bytes(8), bytes(8)]}, e.ERROR_REASON_INPUT_UNKNOWN),
        ({"columns": [bytes(7)]}, e.ERROR_REASON_INPUT_SIZE),
        ({"lengths": bytes(4), "columns": [b""]}, e.ERROR_REASON_INPUT_EMPTY),
        (
            {"lengths": np.array([65], np.uint32).tobytes(), "columns": [bytes(8 * 65)]},
            e.ERROR_REASON_INPUT_TOO_LONG,
        ),
    ],
)
async def test_columns_that_do_not_fit(server, make_frame, extra, reason) -> None:
    stream = server.stream()
    await attach_all(stream, 1)
    frame = make_frame([0], [1], [[1.0]])
    for name, value in extra.items():
        frame.ClearField(name)
        frame.MergeFrom(pb.StepFrame(**{name: value}))
    await stream.send(frame=frame)
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (0, 1, reason)
    assert await stream.answer(0, 1, 1.0) == [11.0]
    await stream.end()


async def test_a_frame_holds_one_model(server) -> None:
    stream = server.stream()
    await stream.attached(0)
    await stream.attached(1, model="other")
    await stream.frame([0, 1], [1, 1], [[1.0], [1.0]])
    for handle in range(2):
        got, seq, fault = await stream.fault()
        assert (got, seq, fault.reason) == (handle, 1, e.ERROR_REASON_FRAME_INVALID)
        assert "other version 1, sum version 1" in fault.message
    await stream.end()


async def test_consecutive_steps_of_one_session_in_a_frame(server) -> None:
    stream = server.stream()
    await stream.attached(0)
    await stream.frame([0] * 4, [1, 2, 3, 4], [[1.0], [2.0], [3.0], [4.0]])
    assert await in_order(stream, 4) == [(0, 1, 11.0), (0, 2, 13.0), (0, 3, 16.0), (0, 4, 20.0)]
    await stream.end()


async def test_a_row_twice_in_a_frame_is_one_step_and_its_repetition(server) -> None:
    stream = server.stream()
    await stream.attached(0)
    await stream.frame([0, 0], [1, 1], [[1.0], [1.0]])
    assert await in_order(stream, 2) == [(0, 1, 11.0), (0, 1, 11.0)]
    assert server.directory.sessions[next(iter(server.directory.sessions))].applied_seq == 1
    assert await stream.answer(0, 2, 1.0) == [12.0]
    await stream.end()


async def test_replayed_rows_are_marked(server) -> None:
    stream = server.stream()
    await attach_all(stream, 3)
    await stream.frame([0, 2], [1, 1], [[1.0], [3.0]])
    await stream.expect("frame")
    await stream.frame([0, 2], [1, 1], [[1.0], [3.0]])
    frame = await stream.expect("frame")
    assert columns(frame) == {0: (1, [11.0], 11.0), 2: (1, [13.0], 13.0)}
    assert np.frombuffer(frame.replayed_rows, np.uint32).tolist() == [0, 1]
    await stream.frame([0, 1, 2], [1, 1, 2], [[1.0], [2.0], [4.0]])
    replayed: dict[int, bool] = {}
    while len(replayed) < 3:
        frame = await stream.expect("frame")
        rows = np.frombuffer(frame.replayed_rows, np.uint32).tolist()
        handles = np.frombuffer(frame.handles, np.uint32).tolist()
        replayed |= {handle: row in rows for row, handle in enumerate(handles)}
    assert replayed == {0: True, 1: False, 2: False}
    assert server.metrics.of(server.engine).replayed == 3
    await stream.end()


async def test_pipelined_frames_are_answered_in_order_of_each_session(server) -> None:
    stream = server.stream()
    await attach_all(stream, 16)
    for seq in range(1, 11):
        await stream.frame(range(16), [seq] * 16, [[1.0]] * 16)
    seen = dict.fromkeys(range(16), 0)
    while min(seen.values()) < 10:
        for handle, (seq, total, _) in columns(await stream.expect("frame")).items():
            assert seq == seen[handle] + 1
            assert total == [10.0 + seq]
            seen[handle] = seq
    await stream.end()


async def test_large_answers_are_split(server, monkeypatch) -> None:
    monkeypatch.setattr(result_wire, "MAX_FRAME_BYTES", 100)
    stream = server.stream()
    await attach_all(stream, 20)
    await stream.frame(range(20), [1] * 20, [[1.0]] * 20)
    results: dict = {}
    rows: list[int] = []
    while len(results) < 20:
        frame = await stream.expect("frame")
        rows.append(len(frame.handles) // 4)
        results |= columns(frame)
    # Sixteen bytes of outputs a row.
    assert rows == [6, 6, 6, 2]
    assert server.runner.rows == [20]
    await stream.end()


async def test_acked_answers_are_forgotten(server) -> None:
    stream = server.stream()
    await stream.attached(0)
    await stream.frame([0], [1], [[1.0]])
    await stream.expect("frame")
    await stream.frame([0], [2], [[1.0]], acked_seqs=np.array([1], np.uint64).tobytes())
    await stream.expect("frame")
    await stream.frame([0], [1], [[1.0]])
    assert (await stream.fault())[2].reason == e.ERROR_REASON_STEP_ANSWER_EVICTED
    await stream.end()


def refused(errors: pb.StepErrorFrame) -> tuple[list[int], list[int], Fault]:
    handles, seqs = np.frombuffer(errors.handles, np.uint32), np.frombuffer(errors.seqs, np.uint64)
    return handles.tolist(), seqs.tolist(), from_status(errors.status)


async def test_rows_of_an_overloaded_model_are_refused_in_one_message(make_server) -> None:
    server = await make_server(max_queue_s=-1.0)
    stream = server.stream()
    await attach_all(stream, 6)
    await stream.frame(range(6), [1] * 6, [[1.0]] * 6)
    handles, seqs, fault = refused(await stream.expect("errors"))
    assert (handles, seqs, fault.reason) == (list(range(6)), [1] * 6, e.ERROR_REASON_OVERLOADED)
    assert fault.metadata.keys() == {"model", "queue_s"}
    assert fault.retry_s is not None
    assert server.metrics.errors == {"OVERLOADED": 6}
    assert not server.runner.rows
    # A step of its own is told by itself.
    await stream.step(3, 1, 1.0)
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (3, 1, e.ERROR_REASON_OVERLOADED)
    await stream.end()


async def test_rows_that_a_draining_server_refuses_can_be_sent_again(server) -> None:
    stream = server.stream()
    await attach_all(stream, 3)
    server.directory.draining = True
    await stream.frame(range(3), [1] * 3, [[1.0]] * 3)
    assert refused(await stream.expect("errors"))[2].reason == e.ERROR_REASON_DRAINING
    await stream.frame(range(3), [2] * 3, [[1.0]] * 3)
    handles, seqs, fault = refused(await stream.expect("errors"))
    assert (handles, seqs, fault.reason) == ([0, 1, 2], [2, 2, 2], e.ERROR_REASON_STEP_ABORTED)
    server.directory.draining = False
    await stream.frame(range(3), [1] * 3, [[1.0]] * 3)
    assert columns(await stream.expect("frame")) == {row: (1, [11.0], 11.0) for row in range(3)}
    await stream.end()


async def test_only_the_rows_that_follow_a_refused_one_are_aborted(server, make_frame) -> None:
    stream = server.stream()
    await attach_all(stream, 4)
    await stream.frame(range(4), [1] * 4, [[1.0], [float("nan")], [1.0], [float("nan")]])
    results, faults = await collect(stream, 4)
    assert (sorted(results), sorted(faults)) == ([0, 2], [1, 3])
    await stream.frame(range(4), [2] * 4, [[1.0]] * 4)
    aborted = results = None
    while aborted is None or results is None:
        response = await stream.receive()
        if response.HasField("errors"):
            aborted = refused(response.errors)
        else:
            results = columns(response.frame)
    assert (aborted[0], aborted[1], aborted[2].reason) == ([1, 3], [2, 2], e.ERROR_REASON_STEP_ABORTED)
    assert results == {0: (2, [12.0], 12.0), 2: (2, [12.0], 12.0)}
    await stream.end()


async def trained(make_server, **limits):
    """A server of a model whose tensors all have time, and a stream with one session."""
    server = await make_server(timed=True, **limits)
    stream = server.stream()
    await stream.attached(0)
    return server, stream


async def test_steps_of_one_session_in_a_frame_run_as_one_where_all_tensors_have_time(make_server) -> None:
    server, stream = await trained(make_server)
    for first in (1, 5):
        await stream.frame(
            [0] * 4, range(first, first + 4), [[1.0]] * 4, acked_seqs=np.uint64([first - 1] * 4).tobytes()
        )
        frame = await stream.expect("frame")
        assert np.frombuffer(frame.handles, np.uint32).tolist() == [0] * 4
        assert np.frombuffer(frame.seqs, np.uint64).tolist() == list(range(first, first + 4))
        assert (frame.lengths, frame.replayed_rows) == (b"", b"")
        assert np.frombuffer(frame.columns[0], np.float64).tolist() == [10.0 + first + turn for turn in range(4)]
    assert server.runner.rows == [1, 1]
    # What was acknowledged is gone, and each of the others can be asked for by itself.
    await stream.frame([0], [4], [[1.0]])
    assert (await stream.fault())[2].reason == e.ERROR_REASON_STEP_ANSWER_EVICTED
    await stream.frame([0, 0], [7, 6], [[1.0], [1.0]])
    frame = await stream.expect("frame")
    assert np.frombuffer(frame.columns[0], np.float64).tolist() == [17.0, 16.0]
    assert np.frombuffer(frame.replayed_rows, np.uint32).tolist() == [0, 1]
    await stream.end()


async def test_a_step_of_a_train_that_fails_stops_those_behind_it(make_server) -> None:
    server, stream = await trained(make_server)
    await stream.frame([0] * 4, [1, 2, 3, 4], [[1.0], [1.0], [server.runner.POISON], [1.0]])
    got = []
    while len(got) < 4:
        response = await stream.receive()
        if response.HasField("frame"):
            got += np.frombuffer(response.frame.columns[0], np.float64).tolist()
        else:
            got.append((response.error.seq, from_status(response.error.status).reason))
    assert got == [11.0, 12.0, (3, e.ERROR_REASON_MODEL_FAILED), (4, e.ERROR_REASON_STEP_ABORTED)]
    await stream.frame([0] * 2, [3, 4], [[5.0], [1.0]])
    assert np.frombuffer((await stream.expect("frame")).columns[0], np.float64).tolist() == [17.0, 18.0]
    await stream.end()


async def test_a_train_that_an_overloaded_model_refuses_names_each_step(make_server) -> None:
    _, stream = await trained(make_server, max_queue_s=-1.0)
    await stream.frame([0] * 3, [1, 2, 3], [[1.0]] * 3)
    handles, seqs, fault = refused(await stream.expect("errors"))
    assert (handles, seqs, fault.reason) == ([0] * 3, [1, 2, 3], e.ERROR_REASON_OVERLOADED)
    await stream.end()


@pytest.mark.parametrize("seqs", [[1, 3], [2, 1], [1, 1], [2, 3]])
async def test_rows_of_one_session_that_do_not_follow_each_other_are_taken_one_by_one(make_server, seqs) -> None:
    server, stream = await trained(make_server)
    await stream.frame([0, 0], seqs, [[1.0], [1.0]])
    kinds = []
    while len(kinds) < 2:
        response = await stream.receive()
        if response.HasField("frame"):
            kinds += ["ok"] * (len(response.frame.handles) // 4)
        elif response.HasField("errors"):
            kinds += [refused(response.errors)[2].reason_name] * len(refused(response.errors)[0])
        else:
            kinds.append(from_status(response.error.status).reason_name)
    expected = {(1, 3): ["ok", "STEP_GAP"], (2, 1): ["STEP_GAP", "ok"], (1, 1): ["ok", "ok"], (2, 3): ["STEP_GAP"] * 2}
    assert sorted(kinds) == sorted(expected[tuple(seqs)])
    assert server.directory.sessions[next(iter(server.directory.sessions))].applied_seq == (1 if 1 in seqs else 0)
    await stream.end()
