"""ModelSpec: JSON there and back, and contradictions found."""

import numpy as np
import pytest
from conveyor_proto import spec as specs
from conveyor_proto.v1 import spec_pb2, tensor_pb2


@pytest.fixture
def spec():
    spec = spec_pb2.ModelSpec(spec_version=1, name="m", state_bytes=16, lengths_input="lengths")
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], has_time=True)
    spec.outputs.add(name="y", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], has_time=True)
    state = spec.states.add(name="h", input_name="h.in", output_name="h.out", shape=[4])
    state.dtype = tensor_pb2.DATA_TYPE_FLOAT32
    state.initial = np.arange(4, dtype=np.float32).tobytes()
    return spec


def test_there_and_back(spec):
    assert specs.parse_spec(specs.dump_spec(spec)) == spec


def test_initial_rows(spec):
    assert specs.initial_row(spec.states[0]).tolist() == [0, 1, 2, 3]
    spec.states[0].initial = b""
    row = specs.initial_row(spec.states[0])
    assert row.tolist() == [0, 0, 0, 0]
    assert row.flags.writeable


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: setattr(s, "spec_version", 2), "export the model again"),
        (lambda s: s.ClearField("inputs"), "at least one input"),
        (lambda s: s.ClearField("outputs"), "at least one input and one output"),
        (lambda s: setattr(s.inputs[0], "has_time", False), "time axis"),
        (lambda s: setattr(s.inputs[0], "name", "h.in"), "used twice"),
        (lambda s: setattr(s.inputs[0], "name", ""), "empty"),
        (lambda s: setattr(s.outputs[0], "name", "h.out"), "used twice"),
        (lambda s: setattr(s, "lengths_input", "x"), "used twice"),
        (lambda s: s.inputs[0].shape.append(0), "at least 1"),
        (lambda s: setattr(s.states[0], "initial", b"123"), "initial row"),
        (lambda s: setattr(s, "state_bytes", 1), "sum over the states"),
        (lambda s: s.states[0].shape.append(1 << 40), "a row of more than"),
        (lambda s: s.inputs[0].shape.extend([1 << 31] * 9), "a row of more than"),
        (lambda s: s.outputs[0].shape.extend([1] * 1000), "axes, more than 16"),
        (lambda s: setattr(s.inputs[0], "name", "x" * 1000), "more than 256 characters"),
        (lambda s: [s.inputs.add(name=f"i{n}") for n in range(1000)], "1001 inputs are more than 256"),
    ],
)
def test_contradictions_are_found(spec, change, text):
    change(spec)
    with pytest.raises(specs.SpecError, match=text):
        specs.parse_spec(specs.dump_spec(spec))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"inputs":' + "[" * 100_000,
        " " * (65 << 20),
        '{"no_such_field": 1}',
        '{"spec_version": "many"}',
    ],
)
def test_what_is_no_spec(text):
    with pytest.raises(specs.SpecError):
        specs.parse_spec(text)
