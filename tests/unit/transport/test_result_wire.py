"""Results that are written by the hundred are, byte for byte, what protobuf writes."""

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto.codec import encode
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.transport import result_wire
from conveyor_server.transport.result_wire import ResultWriter, write_frames
from hypothesis import given, settings

BOUNDS = [bound for size in range(1, 5) for bound in ((1 << 7 * size) - 1, 1 << 7 * size)]
HANDLES = st.one_of(st.sampled_from([0, 1, *BOUNDS, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1))
SEQS = st.one_of(st.sampled_from([1, *BOUNDS, 1 << 42, (1 << 49) - 1, 1 << 56, (1 << 63) - 1]), st.integers(1, 1 << 62))
# Of the largest int64, and whatever bytes a fixed64 may have.
DURABLE = st.one_of(st.sampled_from([0, 1, 255, 256, 0x0A12_1A22_2932, (1 << 63) - 1]), st.integers(0, (1 << 63) - 1))
OUTPUTS = (
    spec_pb2.TensorSpec(name="y", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], has_time=True),
    spec_pb2.TensorSpec(name="last state", dtype=tensor_pb2.DATA_TYPE_FLOAT64),
    spec_pb2.TensorSpec(name="k", dtype=tensor_pb2.DATA_TYPE_BOOL, shape=[2, 2], has_time=True),
)


def by_protobuf(handle: int, seq: int, outputs: list[np.ndarray], specs, durable_seq: int | None = None) -> bytes:
    tensors = [encode(array, item.name) for array, item in zip(outputs, specs, strict=True)]
    result = pb.StepResult(handle=handle, seq=seq, outputs=tensors, durable_seq=durable_seq)
    return pb.StreamResponse(result=result).SerializeToString()


def make_outputs(specs, rows: int, length: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    dtypes = {tensor_pb2.DATA_TYPE_FLOAT32: np.float32, tensor_pb2.DATA_TYPE_FLOAT64: np.float64}
    return [
        (rng.standard_normal((rows, length, *item.shape) if item.has_time else (rows, *item.shape)) * 9).astype(
            dtypes.get(item.dtype, np.bool_)
        )
        for item in specs
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(HANDLES, SEQS, DURABLE), min_size=1, max_size=9),
    st.integers(1, 40),
    st.sets(st.integers(0, 2), min_size=1),
    st.integers(0, 99),
    st.booleans(),
)
def test_results_are_those_of_protobuf(numbers, length, chosen, seed, says):
    specs = [OUTPUTS[index] for index in sorted(chosen)]
    writer = ResultWriter(specs, says_durable=says)
    handles, seqs, durable = (np.array(column, np.int64) for column in zip(*numbers, strict=True))
    outputs = make_outputs(specs, len(numbers), length, seed)
    expected = [
        by_protobuf(handle, seq, [array[row] for array in outputs], specs, durable_seq if says else None)
        for row, (handle, seq, durable_seq) in enumerate(numbers)
    ]
    assert writer.write(handles, seqs, outputs, durable) == expected
    alone = [
        writer.write_one(handle, seq, [array[row] for array in outputs], durable_seq)
        for row, (handle, seq, durable_seq) in enumerate(numbers)
    ]
    assert alone == expected


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("sizes", [(0, 1), (1, 2), (5, 9)])
def test_the_shape_of_a_result_says_where_its_numbers_and_data_lie(sizes, says):
    specs = OUTPUTS[:2]
    answer, label, starts, durable = ResultWriter(specs, says_durable=says).shape(sizes, 1)
    handle, seq = (1 << 7 * (size - 1) if size else 0 for size in sizes)
    outputs, filled = make_outputs(specs, 1, 1, 3), bytearray(answer)
    for start, array in zip(starts, outputs, strict=True):
        filled[start : start + array.nbytes] = array.tobytes()
    if says:
        filled[durable : durable + 8] = (77).to_bytes(8, "little")
    assert says == (durable >= 0)
    assert bytes(filled) == by_protobuf(handle, seq, [array[0] for array in outputs], specs, 77 if says else None)
    assert answer[label] == (0x08 if sizes[0] else 0x10)


def test_sessions_of_which_nothing_is_known_are_nowhere_in_the_store():
    specs, outputs = OUTPUTS[:1], make_outputs(OUTPUTS[:1], 2, 3, 1)
    writer = ResultWriter(specs, says_durable=True)
    messages = writer.write(np.array([1, 2]), np.array([3, 4]), outputs)
    assert messages == [by_protobuf(row + 1, row + 3, [outputs[0][row]], specs, 0) for row in range(2)]


@pytest.mark.parametrize("handle", [0, 1, 127, 128, 16383, 16384, (1 << 32) - 1])
@pytest.mark.parametrize("seq", [1, 127, 128, 16383, 16384, 1 << 40])
def test_numbers_of_every_size(handle, seq):
    specs, outputs = OUTPUTS[:2], make_outputs(OUTPUTS[:2], 1, 1, 5)
    (message,) = ResultWriter(specs).write(np.array([handle]), np.array([seq]), outputs)
    assert message == by_protobuf(handle, seq, [array[0] for array in outputs], specs)


def test_templates_of_many_lengths_do_not_pile_up():
    specs = OUTPUTS[:1]
    writer = ResultWriter(specs)
    for length in range(1, 600):
        outputs = make_outputs(specs, 2, length, length)
        messages = writer.write(np.array([1, 300]), np.array([1, 1]), outputs)
        assert messages[1] == by_protobuf(300, 1, [outputs[0][1]], specs)
    assert len(writer._templates) <= result_wire._MOST_TEMPLATES + 2


def test_outputs_that_are_a_view_of_a_padded_run():
    outputs = [array[1:4, :2] for array in make_outputs(OUTPUTS[:1], 6, 5, 3)]
    assert not outputs[0].flags.c_contiguous
    messages = ResultWriter(OUTPUTS[:1]).write(np.array([1, 2, 3]), np.array([4, 5, 6]), outputs)
    assert messages == [by_protobuf(row + 1, row + 4, [outputs[0][row]], OUTPUTS[:1]) for row in range(3)]


# ---------------------------------------------------------------- frames


def frame_by_protobuf(handles, seqs, length: int, outputs, durable) -> bytes:
    rows = len(handles)
    frame = pb.ResultFrame(
        handles=np.array(handles, np.uint32).tobytes(),
        seqs=np.array(seqs, np.uint64).tobytes(),
        lengths=b"" if length == 1 else np.full(rows, length, np.uint32).tobytes(),
        columns=[np.ascontiguousarray(array).tobytes() for array in outputs],
        durable_seqs=b"" if durable is None else np.array(durable, np.uint64).tobytes(),
    )
    return pb.StreamResponse(frame=frame).SerializeToString()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(HANDLES, SEQS, DURABLE), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sets(st.integers(0, 2), min_size=1),
    st.sampled_from([1, 50, 200, 1 << 20]),
    st.booleans(),
)
def test_frames_are_those_of_protobuf_and_hold_no_more_than_they_may(numbers, length, chosen, most, says):
    specs = [OUTPUTS[index] for index in sorted(chosen)]
    handles, seqs, durable = (np.array(column, np.int64) for column in zip(*numbers, strict=True))
    durable = durable if says else None
    outputs = make_outputs(specs, len(numbers), length, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_wire, "MAX_FRAME_BYTES", most)
        frames = list(write_frames(handles, seqs, length, outputs, durable))
    row_bytes = sum(array[0].nbytes for array in outputs) + (8 if says else 0)
    rows = max(1, most // row_bytes)
    assert frames == [
        frame_by_protobuf(
            handles[start : start + rows],
            seqs[start : start + rows],
            length,
            [array[start : start + rows] for array in outputs],
            None if durable is None else durable[start : start + rows],
        )
        for start in range(0, len(numbers), rows)
    ]
