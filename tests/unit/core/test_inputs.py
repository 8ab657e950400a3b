"""The gate before a session: what passes, and the reason for what does not."""

import numpy as np
import pytest
from conveyor_proto.codec import WireError, encode
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2
from conveyor_server.frame_inputs import read_columns, read_numbers
from conveyor_server.inputs import decode_step


def decode_frame(message, spec, *, max_time_steps):
    """The numbers, and each row's content."""
    numbers = read_numbers(message)
    columns = read_columns(message, len(numbers.handles), spec)
    return numbers, columns, list(columns.rows(max_time_steps, range(len(numbers.handles))))


@pytest.fixture
def spec():
    spec = spec_pb2.ModelSpec(spec_version=1)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
    spec.inputs.add(name="token", dtype=tensor_pb2.DATA_TYPE_INT64, has_time=True)
    spec.inputs.add(name="speaker", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3])
    return spec


def tensors(time=2, *, x=None, token_time=None, speaker=None):
    return [
        encode(np.ones((time, 2), np.float32) if x is None else x, "x"),
        encode(np.arange(time if token_time is None else token_time), "token"),
        encode(np.zeros(3, np.float32) if speaker is None else speaker, "speaker"),
    ]


def frame(rows, /, **changes):
    count, total = len(rows), sum(rows)
    fields = {
        "handles": np.arange(count, dtype=np.uint32).tobytes(),
        "seqs": np.arange(1, count + 1, dtype=np.uint64).tobytes(),
        "lengths": np.array(rows, np.uint32).tobytes(),
        "columns": [
            np.arange(total * 2, dtype=np.float32).tobytes(),
            np.arange(total, dtype=np.int64).tobytes(),
            np.arange(count * 3, dtype=np.float32).tobytes(),
        ],
    }
    return session_pb2.StepFrame(**{**fields, **changes})


def refusal(call, *args, **kwargs):
    with pytest.raises(WireError) as error:
        call(*args, **kwargs)
    return error.value.fault


def test_inputs_by_name_in_any_order_and_by_position(spec):
    first, second, third = tensors()
    by_name = decode_step([third, first, second], spec, max_time_steps=8)
    for item in (first, second, third):
        item.name = ""
    by_position = decode_step([first, second, third], spec, max_time_steps=8)
    assert by_name.length == by_position.length == 2
    assert by_name.fingerprint == by_position.fingerprint
    assert [array.shape for array in by_name.inputs] == [(2, 2), (2,), (3,)]


@pytest.mark.parametrize(
    ("make", "reason", "name"),
    [
        (lambda: tensors()[:2], "INPUT_MISSING", "speaker"),
        (lambda: [*tensors(), encode(np.ones(1), "what")], "INPUT_UNKNOWN", "what"),
        (lambda: [*tensors(), tensors()[0]], "INPUT_REPEATED", "x"),
        (lambda: [*tensors(), encode(np.ones(1))], "INPUT_UNKNOWN", "#3"),
        (lambda: tensors(0), "INPUT_EMPTY", "x"),
        (lambda: tensors(9), "INPUT_TOO_LONG", "x"),
        (lambda: tensors(2, token_time=3), "INPUT_SHAPE", "token"),
        (lambda: tensors(x=np.ones((2, 2))), "INPUT_DTYPE", "x"),
        (lambda: tensors(x=np.ones((2, 5), np.float32)), "INPUT_SHAPE", "x"),
        (lambda: tensors(x=np.array([[1, np.nan], [1, 1]], np.float32)), "INPUT_NON_FINITE", "x"),
        (lambda: tensors(speaker=np.array([1, np.inf, 0], np.float32)), "INPUT_NON_FINITE", "speaker"),
        (lambda: tensors(speaker=np.array([-np.inf, np.inf, 0], np.float32)), "INPUT_NON_FINITE", "speaker"),
    ],
)
def test_what_does_not_fit(spec, make, reason, name):
    fault = refusal(decode_step, make(), spec, max_time_steps=8)
    assert fault.reason_name == reason
    assert fault.metadata["input"] == name


def test_non_finite_inputs_pass_where_the_model_takes_them(spec):
    spec.allow_non_finite_inputs = True
    step = decode_step(tensors(x=np.full((2, 2), np.nan, np.float32)), spec, max_time_steps=8)
    assert np.isnan(step.inputs[0]).all()


def test_different_content_has_different_fingerprints(spec):
    one = decode_step(tensors(), spec, max_time_steps=8)
    other = decode_step(tensors(x=np.zeros((2, 2), np.float32)), spec, max_time_steps=8)
    assert one.fingerprint != other.fingerprint


def test_frame_rows_are_what_single_steps_would_be(spec):
    lengths = [1, 3, 2]
    numbers, columns, rows = decode_frame(frame(lengths), spec, max_time_steps=8)
    assert numbers.handles.tolist() == [0, 1, 2]
    assert numbers.seqs.tolist() == [1, 2, 3]
    assert columns.acked_seqs is None
    start = 0
    for index, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        x = np.arange(12, dtype=np.float32).reshape(6, 2)[start : start + length]
        token = np.arange(6)[start : start + length]
        speaker = np.arange(9, dtype=np.float32).reshape(3, 3)[index]
        single = decode_step([encode(x), encode(token), encode(speaker)], spec, max_time_steps=8)
        assert row.length == single.length == length
        assert row.fingerprint == single.fingerprint
        for ours, theirs in zip(row.inputs, single.inputs, strict=True):
            assert np.array_equal(ours, theirs)
        start += length


def test_lengths_left_out_mean_one_each(spec):
    _, _, rows = decode_frame(frame([1, 1], lengths=b""), spec, max_time_steps=8)
    assert [row.length for row in rows] == [1, 1]


def test_rows_that_are_alike_make_a_block_of_the_same_content(spec):
    _, columns, rows = decode_frame(frame([2, 2, 2]), spec, max_time_steps=8)
    block = columns.block(8)
    assert block.length == 2
    for index, row in enumerate(rows):
        assert block.prints[index] == row.fingerprint
        for ours, theirs in zip(block.inputs, row.inputs, strict=True):
            assert np.array_equal(ours[index], theirs)


@pytest.mark.parametrize("lengths", [[1, 2], [0, 0], [9, 9]])
def test_rows_that_are_not_alike_or_too_long_make_none(spec, lengths):
    assert decode_frame(frame(lengths), spec, max_time_steps=8)[1].block(8) is None


def test_a_row_that_cannot_be_used_spoils_a_block(spec):
    message = frame([1, 1])
    message.columns[0] = np.array([0, np.inf, 1, 2], np.float32).tobytes()
    assert decode_frame(message, spec, max_time_steps=8)[1].block(8) is None
    spec.allow_non_finite_inputs = True
    assert decode_frame(message, spec, max_time_steps=8)[1].block(8) is not None


@pytest.mark.parametrize(
    ("lengths", "changes", "reason"),
    [
        ([], {}, "FRAME_INVALID"),
        ([1, 1], {"seqs": np.array([1, 2**63], np.uint64).tobytes()}, "FRAME_INVALID"),
        ([1, 1], {"handles": b"12345"}, "FRAME_INVALID"),
        ([1, 1], {"seqs": b"12345678"}, "FRAME_INVALID"),
        ([1, 1], {"lengths": b"1234"}, "FRAME_INVALID"),
        ([1, 1], {"acked_seqs": b"1"}, "FRAME_INVALID"),
        ([1, 1], {"columns": [b"", b""]}, "INPUT_MISSING"),
        ([1, 1], {"columns": [b"", b"", b"", b""]}, "INPUT_UNKNOWN"),
        ([1, 1], {"columns": [b"1" * 15, b"1" * 16, b"1" * 24]}, "INPUT_SIZE"),
        ([1, 1], {"lengths": np.array([2**32 - 1] * 2, np.uint32).tobytes()}, "INPUT_SIZE"),
    ],
)
def test_frames_that_cannot_be_read(spec, lengths, changes, reason):
    assert refusal(decode_frame, frame(lengths, **changes), spec, max_time_steps=8).reason_name == reason


def test_one_bad_row_does_not_harm_the_others(spec):
    message = frame([1, 0, 9, 2])
    x = np.arange(24, dtype=np.float32)
    x[1] = np.nan
    message.columns[0] = x.tobytes()
    _, _, rows = decode_frame(message, spec, max_time_steps=8)
    assert [row.reason_name if isinstance(row, Fault) else row.length for row in rows] == [
        "INPUT_NON_FINITE",
        "INPUT_EMPTY",
        "INPUT_TOO_LONG",
        2,
    ]
