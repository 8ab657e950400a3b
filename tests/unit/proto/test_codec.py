"""The tensor codec: there and back for every type, and a reason for everything else."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto import codec
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from hypothesis import given

DTYPES = [np.float32, np.float64, np.float16, np.bool_]
DTYPES += [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]


def reason_of(error):
    return error.value.fault.reason_name


@given(st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))))
def test_there_and_back(array):
    tensor = tensor_pb2.Tensor.FromString(codec.encode(array, "x").SerializeToString())
    back = codec.decode(tensor)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


def test_every_data_type_has_a_dtype():
    for value in tensor_pb2.DataType.values():
        if value != tensor_pb2.DATA_TYPE_UNSPECIFIED:
            assert codec.to_data_type(codec.to_numpy_dtype(value)) == value


def test_memory_order_does_not_travel():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(codec.decode(codec.encode(array)), array)


@pytest.mark.parametrize("dtype", [np.complex64, np.object_, np.dtype("U3")])
def test_types_that_cannot_be_sent(dtype):
    with pytest.raises(codec.WireError, match="cast it first") as error:
        codec.encode(np.zeros(2, dtype))
    assert reason_of(error) == "INPUT_DTYPE"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (tensor_pb2.Tensor(dtype=1, shape=[2], data=b"1234"), "INPUT_SIZE"),
        (tensor_pb2.Tensor(dtype=1, shape=[-1, -4], data=b"0" * 16), "INPUT_SHAPE"),
        (tensor_pb2.Tensor(dtype=1, shape=[2**40], data=b""), "INPUT_SIZE"),
        (tensor_pb2.Tensor(dtype=1, shape=[2**62, 2**62], data=b""), "INPUT_SHAPE"),
        (tensor_pb2.Tensor(dtype=1, shape=[0, 2**62, 2**62], data=b""), "INPUT_SHAPE"),
        (tensor_pb2.Tensor(dtype=1, shape=[1] * 33, data=b"1234"), "INPUT_SHAPE"),
        (tensor_pb2.Tensor(dtype=1, shape=[2**62] * 1_000_000, data=b""), "INPUT_SHAPE"),
        (tensor_pb2.Tensor(dtype=0, shape=[1], data=b"1234"), "INPUT_DTYPE"),
        (tensor_pb2.Tensor(dtype=99, shape=[1], data=b"1234"), "INPUT_DTYPE"),
    ],
)
def test_tensors_that_contradict_themselves(tensor, reason):
    with pytest.raises(codec.WireError) as error:
        codec.decode(tensor)
    assert reason_of(error) == reason


PER_STEP = spec_pb2.TensorSpec(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], has_time=True)
SCALAR = spec_pb2.TensorSpec(name="token", dtype=tensor_pb2.DATA_TYPE_INT64, has_time=True)
ONCE = spec_pb2.TensorSpec(name="speaker", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2])


def tensor(array, **fields):
    message = codec.encode(np.asarray(array))
    for name, value in fields.items():
        message.ClearField(name)
        if value:
            getattr(message, name).extend(value)
    return message


@pytest.mark.parametrize(
    ("spec", "array"),
    [
        (PER_STEP, np.ones((4, 3), np.float32)),
        (PER_STEP, np.ones((0, 3), np.float32)),
        (SCALAR, np.arange(5)),
        (ONCE, np.ones(2, np.float32)),
    ],
)
@pytest.mark.parametrize("lean", [False, True])
def test_inputs_of_a_step(spec, array, lean):
    message = tensor_pb2.Tensor(data=array.tobytes()) if lean else codec.encode(array)
    assert np.array_equal(codec.decode_input(message, spec), array)


@pytest.mark.parametrize(
    ("spec", "message", "reason", "text"),
    [
        (PER_STEP, tensor(np.ones((4, 3))), "INPUT_DTYPE", "float32"),
        (PER_STEP, tensor(np.ones((4, 2), np.float32)), "INPUT_SHAPE", r"\[time, 3\]"),
        (PER_STEP, tensor(np.ones(3, np.float32)), "INPUT_SHAPE", r"\[time, 3\]"),
        (PER_STEP, tensor(np.ones((1, 4, 3), np.float32)), "INPUT_SHAPE", r"\[time, 3\]"),
        (PER_STEP, tensor_pb2.Tensor(data=b"12345"), "INPUT_SIZE", "12 bytes"),
        (PER_STEP, tensor_pb2.Tensor(dtype=1, shape=[2, 3], data=b"1" * 12), "INPUT_SIZE", "12 bytes"),
        (ONCE, tensor(np.ones((1, 2), np.float32)), "INPUT_SHAPE", r"\[2\]"),
        (ONCE, tensor_pb2.Tensor(data=b""), "INPUT_SIZE", "8 bytes"),
        (SCALAR, tensor(np.ones((2, 2), np.int64)), "INPUT_SHAPE", r"\[time\]"),
        (SCALAR, tensor_pb2.Tensor(dtype=99, data=b"12345678"), "INPUT_DTYPE", "int64"),
    ],
)
def test_inputs_that_do_not_fit(spec, message, reason, text):
    with pytest.raises(codec.WireError, match=text) as error:
        codec.decode_input(message, spec)
    assert reason_of(error) == reason
    assert error.value.fault.metadata["input"] == spec.name
