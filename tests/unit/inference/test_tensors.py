"""Every datatype, as raw bytes and as typed contents."""

import numpy as np
import pytest
from conveyor_proto.codec import WireError, to_data_type
from conveyor_proto.inference import model_config_pb2
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.v1 import spec_pb2
from conveyor_server.inference.datatypes import config_type, datatype, read_tensor
from conveyor_server.inference.requests import read_content

# dtype, its name, and the field of typed contents; FP16 has none.
TYPES = [
    (np.bool_, "BOOL", "bool_contents"),
    (np.int8, "INT8", "int_contents"),
    (np.int16, "INT16", "int_contents"),
    (np.int32, "INT32", "int_contents"),
    (np.int64, "INT64", "int64_contents"),
    (np.uint8, "UINT8", "uint_contents"),
    (np.uint16, "UINT16", "uint_contents"),
    (np.uint32, "UINT32", "uint_contents"),
    (np.uint64, "UINT64", "uint64_contents"),
    (np.float16, "FP16", ""),
    (np.float32, "FP32", "fp32_contents"),
    (np.float64, "FP64", "fp64_contents"),
]


def item_of(dtype: type) -> spec_pb2.TensorSpec:
    return spec_pb2.TensorSpec(name="x", dtype=to_data_type(np.dtype(dtype)), shape=[3])


def extremes(dtype: type) -> np.ndarray:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    bounds = np.finfo(dtype) if kind == "f" else np.iinfo(dtype)
    return np.array([[bounds.min, 0, 1], [2, 3, bounds.max]], dtype)


@pytest.mark.parametrize(("dtype", "name", "field"), TYPES, ids=[name for _, name, _ in TYPES])
def test_raw_and_typed_contents_are_the_same_to_the_bit(dtype, name, field) -> None:
    item, values = item_of(dtype), extremes(dtype)
    assert datatype(item) == name
    assert model_config_pb2.DataType.Name(config_type(item)) == f"TYPE_{name}"
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=name, shape=[2, 3])
    raw = read_tensor(tensor, values.tobytes(), item, "m")
    assert (raw.dtype, raw.shape, raw.tobytes()) == (values.dtype, (2, 3), values.tobytes())
    assert not raw.flags.writeable
    if not field:
        with pytest.raises(WireError, match="send it in raw_input_contents"):
            read_tensor(tensor, None, item, "m")
        return
    getattr(tensor.contents, field).extend(values.reshape(-1).tolist())
    typed = read_tensor(tensor, None, item, "m")
    assert (typed.dtype, typed.shape, typed.tobytes()) == (values.dtype, (2, 3), values.tobytes())
    assert not typed.flags.writeable


@pytest.mark.parametrize(
    ("dtype", "field", "value"),
    [
        (np.int8, "int_contents", 128),
        (np.int8, "int_contents", -129),
        (np.int16, "int_contents", 1 << 15),
        (np.uint8, "uint_contents", 256),
        (np.uint16, "uint_contents", 1 << 16),
    ],
)
def test_numbers_that_do_not_fit_are_refused_and_never_cut(dtype, field, value) -> None:
    item = item_of(dtype)
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype(item), shape=[1])
    getattr(tensor.contents, field).append(value)
    with pytest.raises(WireError, match=f"holds numbers that are no {datatype(item)}"):
        read_tensor(tensor, None, item, "m")


def test_contents_of_another_type_are_refused() -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1])
    tensor.contents.fp64_contents.append(1.0)
    with pytest.raises(WireError, match=r"send it in contents\.fp32_contents, or in raw_input_contents"):
        read_tensor(tensor, None, item_of(np.float32), "m")


def text_item(dtype: type = np.int64, **fields: object) -> spec_pb2.TensorSpec:
    item = spec_pb2.TensorSpec(name="x", dtype=to_data_type(np.dtype(dtype)), has_time=True)
    item.MergeFrom(spec_pb2.TensorSpec(**fields))
    return item


def text_of(*shape: int) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name="x", datatype="BYTES", shape=shape)


def content_of(item: spec_pb2.TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor, *raw: bytes):
    """What a model with state that takes one such input reads."""
    spec = spec_pb2.ModelSpec(inputs=[item], states=[spec_pb2.StateSpec()])
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=raw)
    return read_content(request, spec, "m", max_time_steps=64)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_a_text_is_a_time_step_for_each_of_its_bytes(dtype) -> None:
    said = "gr\u00fcn".encode()
    for shape, batched in (((1,), False), ((1, 1), True)):
        typed = text_of(*shape)
        typed.contents.bytes_contents.append(said)
        for content in (
            content_of(text_item(dtype), text_of(*shape), len(said).to_bytes(4, "little") + said),
            content_of(text_item(dtype), typed),
        ):
            (array,) = content.inputs
            assert (array.dtype, array.shape, array.ravel().tolist()) == (np.dtype(dtype), (1, 5), list(said))
            assert (content.batch, content.length, content.batched, content.timed) == (1, 5, batched, True)


@pytest.mark.parametrize(
    ("shape", "raw", "text"),
    [
        ((1,), b"\x03\0\0\0ab", "one element of BYTES"),
        ((1,), b"\x01\0\0\0ab", "one element of BYTES"),
        ((1,), b"ab", "one element of BYTES"),
        ((2,), b"\x01\0\0\0a\x01\0\0\0b", "one element of BYTES"),
        ((1, 2), b"\x01\0\0\0a", "one element of BYTES"),
        ((), b"\x01\0\0\0a", "one element of BYTES"),
        ((1,), b"\0\0\0\0", "no time steps"),
        ((1,), b"\x41\0\0\0" + b"a" * 65, "65 time steps and one step takes 64"),
    ],
)
def test_a_text_that_is_cut_or_empty_or_too_long_or_one_of_several_is_refused(shape, raw, text) -> None:
    with pytest.raises(WireError, match=text):
        content_of(text_item(), text_of(*shape), raw)


@pytest.mark.parametrize("item", [text_item(np.int8), text_item(np.float32), text_item(shape=[2]), item_of(np.int64)])
def test_no_text_goes_where_time_steps_are_no_bytes(item) -> None:
    with pytest.raises(WireError, match="data-type is 'BYTES', but model 'm' expects"):
        content_of(item, text_of(*[1] * item.has_time, *item.shape), b"\x01\0\0\0a")
