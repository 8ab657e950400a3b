"""Layouts of step messages: what matches one says what protobuf reads in it, and what else there is matches none."""

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.inputs import StepInputs, StepReader
from conveyor_server.transport.step_layout import find_layout
from google.protobuf.message import DecodeError
from hypothesis import given, settings

F32, F64, I32 = tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT64, tensor_pb2.DATA_TYPE_INT32


def make_spec(*inputs: tuple[str, int, list[int], bool]) -> spec_pb2.ModelSpec:
    spec = spec_pb2.ModelSpec(allow_non_finite_inputs=True)
    for name, dtype, shape, has_time in inputs:
        spec.inputs.add(name=name, dtype=dtype, shape=shape, has_time=has_time)
    return spec


ONE = make_spec(("x", F32, [2], True))
THREE = make_spec(("x", F32, [2], True), ("gain", F64, [], False), ("k", I32, [1], True))
SPECS = st.sampled_from([ONE, THREE])


# ---------------------------------------------------------------- a writer that may write in any way


def varint(value: int, extra: int = 0) -> bytes:
    """The value in as few bytes as it takes, and `extra` more."""
    parts = bytearray()
    while value > 0x7F or extra > 0:
        if value <= 0x7F:
            extra -= 1
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def number(field: int, value: int, extra: int = 0) -> bytes:
    return varint(field << 3) + varint(value, extra)


def block(field: int, data: bytes, extra: int = 0) -> bytes:
    return varint(field << 3 | 2) + varint(len(data), extra) + data


@st.composite
def tensors(draw, spec: spec_pb2.ModelSpec, length: int) -> list[bytes]:
    """The model's inputs as fields of a Step, named where they are not in order."""
    order = draw(st.permutations(range(len(spec.inputs))))
    written = []
    for index in order:
        item = spec.inputs[index]
        shape = [length, *item.shape] if item.has_time else [*item.shape]
        size = int(np.prod(shape)) * {F32: 4, F64: 8, I32: 4}[item.dtype]
        fields = [block(4, draw(st.binary(min_size=size, max_size=size)), draw(EXTRA))]
        if list(order) != sorted(order) or draw(st.booleans()):
            fields.append(block(1, item.name.encode()))
        if draw(st.booleans()):
            fields.append(number(2, item.dtype, draw(EXTRA)))
        if draw(st.booleans()) and shape:
            fields.append(block(3, b"".join(map(varint, shape))))
        if draw(RARELY):
            fields.append(number(9, 5))
        written.append(block(3, b"".join(draw(st.permutations(fields))), draw(EXTRA)))
    return written


EXTRA = st.sampled_from([0, 0, 0, 1, 3])
RARELY = st.sampled_from([False] * 9 + [True])
NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, (1 << 63) - 1))


@st.composite
def messages(draw, spec: spec_pb2.ModelSpec) -> bytes:
    """StreamRequests with a step, written in any way that a writer may."""
    length = draw(st.integers(1, 3))
    inputs = draw(tensors(spec, length))
    others = [number(2, draw(NUMBERS), draw(EXTRA))]
    if draw(st.booleans()):
        others.append(number(1, draw(st.integers(0, (1 << 32) - 1)), draw(EXTRA)))
    if draw(st.booleans()):
        others.append(number(4, draw(st.integers(0, 1 << 20)), draw(EXTRA)))
    if draw(st.booleans()):
        others.append(number(5, draw(NUMBERS), draw(EXTRA)))
    if draw(RARELY):
        others.append(draw(st.sampled_from([number(2, 7), number(99, 1), block(77, b"ab"), b"\x5d\0\0\0\0"])))
    # Inputs keep their own order: it is their meaning.
    places = draw(st.permutations([True] * len(inputs) + [False] * len(others)))
    others, inputs = iter(draw(st.permutations(others))), iter(inputs)
    step = b"".join(next(inputs) if is_input else next(others) for is_input in places)
    before = draw(st.sampled_from([b"", b"", b"", b"", number(99, 1), block(4, b"")]))
    after = draw(st.sampled_from([b"", b"", b"", b"", number(99, 1), block(4, b"")]))
    return before + block(2, step, draw(EXTRA)) + after


def read(message: bytes, spec: spec_pb2.ModelSpec):
    """What protobuf and the reader of single steps make of a message; None: no usable step."""
    try:
        request = pb.StreamRequest.FromString(message)
    except DecodeError:
        return None
    if request.WhichOneof("kind") != "step":
        return None
    content = StepReader(spec).read(request.step.inputs, 64)
    return (request.step, content) if isinstance(content, StepInputs) else None


def assert_reads_the_same(layout, message: bytes, spec: spec_pb2.ModelSpec) -> None:
    array = np.frombuffer(message, np.uint8)[None]
    known = read(message, spec)
    assert known is not None, "no step that could be used"
    step, content = known
    heads = layout.heads(array)
    handle, seq, acked_seq = layout.numbers(heads)[:, 0].tolist()
    # One over 32 bits is cut by protobuf; here it names no session, and the message is read alone.
    assert handle == step.handle or handle >> 32
    assert (seq, acked_seq) == (step.seq, step.acked_seq)
    assert layout.has_acked_seq or not step.acked_seq
    labels = layout.labels(heads)
    if labels is not None:
        # As the beginning of a StepResult, it names the same step.
        result = pb.StepResult.FromString(labels[0].tobytes())
        assert (result.handle, result.seq) == (step.handle, step.seq)
        assert sum(layout.label_sizes) + sum(map(bool, layout.label_sizes)) == labels.shape[1]
    assert (layout.timeout_ms, layout.length) == (step.timeout_ms, content.length)
    for got, expected in zip(layout.arrays(array), content.inputs, strict=True):
        assert (got.dtype, got[0].shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def matching(layout, batch: list[bytes]) -> list[bytes]:
    array = np.frombuffer(b"".join(batch), np.uint8).reshape(len(batch), -1)
    like = layout.matches(layout.heads(array))
    return batch if like is None else [message for message, alike in zip(batch, like.tolist(), strict=True) if alike]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_matches_reads_as_protobuf_reads_it(data):
    spec = data.draw(SPECS)
    message = data.draw(messages(spec))
    known = read(message, spec)
    if known is None:
        return
    layout = find_layout(message, known[0], spec, known[1].length)
    if layout is None:
        return
    assert matching(layout, [message]) == [message]
    # Neighbours of the same size: others that were written, and this one with some bytes changed.
    spoiled = []
    for _ in range(6):
        other = bytearray(message)
        for _ in range(data.draw(st.integers(1, 3))):
            other[data.draw(st.integers(0, len(other) - 1))] = data.draw(st.integers(0, 255))
        spoiled.append(bytes(other))
    for same in matching(layout, [message, *spoiled]):
        assert_reads_the_same(layout, same, spec)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.integers(0, (1 << 32) - 1), st.integers(1, (1 << 63) - 1), st.integers(0, 1 << 62), st.data())
def test_what_protobuf_writes_has_a_layout_that_fits_all_of_its_size(spec, handle, seq, acked_seq, data):
    """The fast path is taken: not only never wrongly, but whenever a client writes as protobuf does."""

    def write() -> bytes:
        inputs = [
            tensor_pb2.Tensor(data=data.draw(st.binary(min_size=size, max_size=size)))
            for size in ((8, 8, 4) if spec is THREE else (8,))
        ]
        step = pb.Step(handle=handle, seq=seq, inputs=inputs, timeout_ms=250, acked_seq=acked_seq)
        return pb.StreamRequest(step=step).SerializeToString()

    first, second = write(), write()
    step, content = read(first, spec)
    layout = find_layout(first, step, spec, content.length)
    assert layout is not None
    assert matching(layout, [first, second]) == [first, second]
    both = np.frombuffer(first + second, np.uint8).reshape(2, -1)
    assert layout.matches(layout.heads(both)) is None
    assert layout.labels(layout.heads(both)) is not None
    for message in (first, second):
        assert_reads_the_same(layout, message, spec)


@pytest.mark.parametrize(
    "message",
    [
        pb.StreamRequest(detach=pb.DetachSession(handle=1)).SerializeToString(),
        block(2, number(2, 1) + number(2, 2) + block(3, block(4, bytes(8)))),
        block(2, number(2, 1) + block(3, block(4, bytes(8)) + number(9, 1))),
        block(2, number(2, 1) + block(3, block(4, bytes(8))) + number(88, 1)),
        block(2, number(2, 1) + block(3, block(4, bytes(8)))) + number(88, 1),
        block(2, number(2, 1) + block(3, block(4, bytes(8)) + block(4, bytes(8)))),
        block(2, number(2, 1) + block(3, b"")),
        block(2, b"\x90\x00\x01" + block(3, block(4, bytes(8)))),
    ],
    ids=[
        *("another kind", "a field twice", "unknown in a tensor", "unknown in the step", "unknown behind the step"),
        *("data twice", "no data", "a tag of two bytes"),
    ],
)
def test_other_forms_have_no_layout(message):
    step = pb.StreamRequest.FromString(message).step
    assert find_layout(message, step, ONE, 1) is None


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_message_that_is_cut_short_has_none(cut):
    step = pb.Step(handle=300, seq=300, inputs=[tensor_pb2.Tensor(name="x", data=bytes(8))], acked_seq=5)
    message = pb.StreamRequest(step=step).SerializeToString()
    assert find_layout(message, step, ONE, 1) is not None
    assert find_layout(message[:-cut], step, ONE, 1) is None
