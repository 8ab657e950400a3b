"""What is written by arrays is what protobuf writes, and what is read by arrays is what protobuf reads."""

import struct

import numpy as np
import pytest
from conveyor.bench.frame_codec import FrameEncoder, decode_frame
from conveyor.bench.inbox import Inbox
from conveyor.bench.model import Column, random_columns
from conveyor.bench.spec import LoadSpec
from conveyor.bench.step_codec import StepDecoder, StepEncoder
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = st.one_of(st.integers(1, 3), st.integers(126, 130), st.integers(16_382, 16_386), st.integers(1, 2**40))
SESSIONS = 6
COLUMNS = [
    Column(True, np.arange(4 * 200, dtype=np.uint8).reshape(4, 200)),
    Column(False, np.arange(4 * 3, dtype=np.uint8).reshape(4, 3)),
]


def integers(values):
    return np.array(values, np.int64)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_steps_are_what_protobuf_writes(data):
    handles = data.draw(st.lists(st.integers(1, 300), min_size=SESSIONS, max_size=SESSIONS))
    stream_ids = data.draw(st.lists(st.integers(0, 2**20), min_size=SESSIONS, max_size=SESSIONS))
    stream_ids = [2 * number + 1 for number in stream_ids]
    encoder = StepEncoder(integers(stream_ids), integers(handles), COLUMNS)
    for _ in range(2):
        sessions = data.draw(st.lists(st.integers(0, SESSIONS - 1), min_size=1, max_size=12))
        same = data.draw(st.booleans())
        seqs = [data.draw(NUMBERS)] * len(sessions) if same else [data.draw(NUMBERS) for _ in sessions]
        acked = [data.draw(st.integers(0, seq - 1)) for seq in seqs]
        frames, begins = encoder.encode(integers(sessions), integers(seqs), integers(acked))
        assert begins[0] == 0
        assert begins[-1] == len(frames)
        for row, session in enumerate(sessions):
            written = frames[begins[row] : begins[row + 1]].tobytes()
            word, flags, stream_id = struct.unpack_from(">IBI", written)
            compressed, length = struct.unpack_from(">BI", written, 9)
            assert (word, flags, stream_id) == ((len(written) - 9) << 8, 0, stream_ids[session])
            assert (compressed, length) == (0, len(written) - 14)
            step = pb.Step(handle=handles[session], seq=seqs[row], acked_seq=acked[row])
            for column in COLUMNS:
                step.inputs.add(data=column.data[session % len(column.data)].tobytes())
            assert written[14:] == pb.StreamRequest(step=step).SerializeToString()


def result(handle, seq, size=40, **more):
    outputs = [tensor_pb2.Tensor(name="y", dtype=1, shape=[1, size // 4], data=bytes(size))]
    return pb.StreamResponse(result=pb.StepResult(handle=handle, seq=seq, outputs=outputs, **more))


def received(messages):
    inbox = Inbox(memoryview(bytearray(1 << 16)))
    at = 11
    for stream, message in messages:
        data = message.SerializeToString()
        inbox.buffer[at : at + len(data)] = data
        inbox.offsets.append(at)
        inbox.sizes.append(len(data))
        inbox.streams.append(stream)
        at += len(data)
    return inbox


OTHERS = [
    pb.StreamResponse(end=pb.StreamEnd()),
    pb.StreamResponse(go_away=pb.GoAway()),
    pb.StreamResponse(error=pb.StepError(handle=3, seq=4)),
    pb.StreamResponse(detached=pb.SessionDetached(handle=1, session_id="x" * 40)),
    pb.StreamResponse(frame=pb.ResultFrame(handles=bytes(8))),
    pb.StreamResponse(result=pb.StepResult(handle=3, seq=4)),
    pb.StreamResponse(result=pb.StepResult(seq=4)),
    pb.StreamResponse(),
]
RESULTS = st.builds(result, st.integers(1, 40_000), NUMBERS, st.sampled_from([40, 400]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.one_of(RESULTS, RESULTS, st.sampled_from(OTHERS)), min_size=1, max_size=30), max_size=4))
def test_results_are_what_protobuf_reads_and_nothing_else_is_taken_for_one(turns):
    decoder = StepDecoder()
    for turn in turns:
        inbox = received(list(enumerate(turn)))
        streams, handles, seqs, others = decoder.decode(inbox, 0, len(turn))
        plain = [(i, m.result.handle, m.result.seq) for i, m in enumerate(turn) if m not in OTHERS]
        assert list(zip(streams.tolist(), handles.tolist(), seqs.tolist(), strict=True)) == plain
        assert others == [index for index, message in enumerate(turn) if message in OTHERS]


def test_only_the_part_that_is_asked_for_is_decoded():
    inbox = received([(n, result(1, 5 + n)) for n in range(6)])
    streams, _, seqs, others = StepDecoder().decode(inbox, 2, 5)
    assert (streams.tolist(), seqs.tolist(), others) == ([2, 3, 4], [7, 8, 9], [])


def test_a_step_that_is_echoed_reads_as_its_result():
    encoder = StepEncoder(integers([1, 3]), integers([1, 200]), COLUMNS)
    frames, begins = encoder.encode(integers([0, 1]), integers([7, 300]), integers([0, 299]))
    inbox = Inbox(memoryview(frames.tobytes() + bytes(64)))
    for row in range(2):
        inbox.offsets.append(int(begins[row]) + 14)
        inbox.sizes.append(int(begins[row + 1] - begins[row]) - 14)
        inbox.streams.append(row)
    streams, handles, seqs, others = StepDecoder().decode(inbox, 0, 2)
    assert (streams.tolist(), handles.tolist(), seqs.tolist(), others) == ([0, 1], [1, 200], [7, 300], [])


@pytest.mark.parametrize("rows", [[10, 11, 12, 13], [11, 13], [12, 12, 13]])
@pytest.mark.parametrize("time_steps", [1, 5])
def test_frames_are_what_protobuf_writes(rows, time_steps):
    encoder = FrameEncoder(range(10, 14), integers([1, 2, 3, 4]), time_steps, COLUMNS)
    seqs, acked = integers(range(len(rows))) + 300, integers(range(len(rows)))
    message = encoder.encode(integers(rows), seqs, acked)
    assert struct.unpack_from(">BI", message) == (0, len(message) - 5)
    frame = pb.StreamRequest.FromString(message[5:]).frame
    assert message[5:] == pb.StreamRequest(frame=frame).SerializeToString()
    assert np.frombuffer(frame.handles, "<u4").tolist() == [row - 9 for row in rows]
    assert np.frombuffer(frame.seqs, "<u8").tolist() == seqs.tolist()
    assert np.frombuffer(frame.acked_seqs, "<u8").tolist() == acked.tolist()
    assert np.frombuffer(frame.lengths, "<u4").tolist() == ([time_steps] * len(rows) if time_steps > 1 else [])
    for column, data in zip(COLUMNS, frame.columns, strict=True):
        assert data == b"".join(column.data[row % len(column.data)].tobytes() for row in rows)


def test_a_result_frame_gives_its_handles_and_seqs():
    handles, seqs = np.array([1, 70_000], "<u4"), np.array([5, 2**40], "<u8")
    frame = pb.ResultFrame(handles=handles.tobytes(), seqs=seqs.tobytes(), columns=[bytes(100_000)], lengths=bytes(8))
    found = decode_frame(memoryview(pb.StreamResponse(frame=frame).SerializeToString()))
    assert found is not None
    assert (found[0].tolist(), found[1].tolist()) == ([1, 70_000], [5, 2**40])
    assert decode_frame(memoryview(result(1, 1).SerializeToString())) is None
    assert decode_frame(memoryview(b"")) is None


def test_inputs_are_random_in_the_model_s_own_dtypes():
    def spec(name, dtype, shape, has_time):
        return spec_pb2.TensorSpec(name=name, dtype=dtype, shape=shape, has_time=has_time)

    inputs = [
        spec("x", tensor_pb2.DATA_TYPE_FLOAT32, [3], True),
        spec("token", tensor_pb2.DATA_TYPE_INT64, [], True),
        spec("on", tensor_pb2.DATA_TYPE_BOOL, [2], False),
        spec("half", tensor_pb2.DATA_TYPE_FLOAT16, [2], False),
    ]
    load = LoadSpec(model="m", sessions=50, time_steps=4, integers_below=7)
    x, token, on, half = random_columns(inputs, load, np.random.default_rng(1))
    assert [column.data.shape for column in (x, token, on, half)] == [(50, 48), (50, 32), (50, 2), (50, 4)]
    assert 0.8 < x.data.view(np.float32).std() < 1.2
    assert set(token.data.view(np.int64).ravel().tolist()) == set(range(7))
    assert set(on.data.ravel().tolist()) == {0, 1}
    assert np.isfinite(half.data.view(np.float16)).all()
