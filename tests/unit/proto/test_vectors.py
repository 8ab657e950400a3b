"""What verifier vectors may be: of their model's tensors, and bounded before anything is made of them."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from conveyor_proto.v1 import spec_pb2, tensor_pb2, vectors_pb2
from conveyor_proto.vectors import (
    MAX_TEXT,
    VectorsError,
    check_vectors,
    difference,
    dump_vectors,
    expected,
    parse_vectors,
    vectors_bytes,
)

F32, I64 = tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_INT64


@pytest.fixture
def spec() -> spec_pb2.ModelSpec:
    spec = spec_pb2.ModelSpec(spec_version=1)
    spec.inputs.add(name="x", dtype=F32, shape=[2], has_time=True)
    spec.inputs.add(name="who", dtype=I64)
    spec.outputs.add(name="y", dtype=F32, shape=[3], has_time=True)
    spec.states.add(name="h", dtype=F32, shape=[4])
    return spec


@pytest.fixture
def vectors() -> vectors_pb2.VerifierVectors:
    found = vectors_pb2.VerifierVectors(vectors_version=1)
    found.vectors.add(
        time_steps=5,
        inputs=[np.zeros((5, 2), np.float32).tobytes(), np.int64(1).tobytes()],
        outputs=[expected(np.arange(15, dtype=np.float32), 4, 1e-5)],
        states=[expected(np.ones(4, np.float32), 1, 1e-5)],
    )
    return found


def test_they_come_back_as_they_were(spec, vectors) -> None:
    text = dump_vectors(vectors)
    assert parse_vectors(text, spec) == vectors
    assert vectors_bytes(vectors) == 40 + 8 + 4 * 4 + 16
    assert json.loads(text)["vectors"][0]["time_steps"] == 5


Change = Callable[[vectors_pb2.VerifierVectors], object]
WRONG: dict[str, tuple[Change, str]] = {
    "another version": (lambda v: setattr(v, "vectors_version", 2), "vectors_version 2 is not 1"),
    "none": (lambda v: v.ClearField("vectors"), "0 verifier vectors"),
    "too many": (lambda v: v.vectors.extend([v.vectors[0]] * 8), "9 verifier vectors"),
    "no time": (lambda v: setattr(v.vectors[0], "time_steps", 0), "vector 1: 0 time steps"),
    "too long": (lambda v: setattr(v.vectors[0], "time_steps", 65), "65 time steps"),
    "an input is missing": (lambda v: v.vectors[0].inputs.pop(), "1 inputs, and the model has 2"),
    "an output is missing": (lambda v: v.vectors[0].outputs.pop(), "0 outputs, and the model has 1"),
    "a state too many": (lambda v: v.vectors[0].states.add(every=1), "2 states, and the model has 1"),
    "a short input": (lambda v: v.vectors[0].inputs.__setitem__(0, b"1234"), "'x' has 4 bytes, where 40 are expected"),
    "a short output": (lambda v: setattr(v.vectors[0].outputs[0], "values", b"1"), "'y' has 1 bytes, where 16 are"),
    "a long state": (lambda v: setattr(v.vectors[0].states[0], "every", 2), "'h' has 16 bytes, where 8 are"),
    "every nothing": (lambda v: setattr(v.vectors[0].states[0], "every", 0), "'h' says no `every`"),
    "any tolerance": (lambda v: setattr(v.vectors[0].states[0], "tolerance", math.inf), "'h' has tolerance inf"),
    "no tolerance": (lambda v: setattr(v.vectors[0].states[0], "tolerance", math.nan), "'h' has tolerance nan"),
    "a negative one": (lambda v: setattr(v.vectors[0].states[0], "tolerance", -1.0), "'h' has tolerance -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(spec, vectors, name) -> None:
    change, told = WRONG[name]
    change(vectors)
    with pytest.raises(VectorsError, match=told):
        check_vectors(vectors, spec)


@pytest.mark.parametrize("text", ["", "{", '{"vectors": 3}', '{"unknown": 1}', "[" * 100_000])
def test_what_is_no_json_of_them(spec, text) -> None:
    with pytest.raises(VectorsError, match=r"is no VerifierVectors"):
        parse_vectors(text, spec)


def test_bounds_come_before_anything_is_made(spec, vectors) -> None:
    with pytest.raises(VectorsError, match="characters"):
        parse_vectors(" " * (MAX_TEXT + 1), spec)
    # Known by one element, and the run would give all of them.
    spec.outputs[0].shape[:] = [1 << 24]
    vectors.vectors[0].outputs[0].every = 1 << 30
    vectors.vectors[0].outputs[0].values = b"1234"
    with pytest.raises(VectorsError, match="outputs of more than"):
        check_vectors(vectors, spec)
    spec.outputs[0].shape[:] = [1]
    spec.states[0].shape[:] = [20_000]
    vectors.vectors[0].outputs[0].CopyFrom(expected(np.zeros(5, np.float32), 1, 0))
    vectors.vectors[0].states[0].CopyFrom(expected(np.zeros(20_000, np.float32), 1, 0))
    with pytest.raises(VectorsError, match="more than 65536"):
        check_vectors(vectors, spec)


@pytest.mark.parametrize(
    ("told", "got", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.nan, 1.0], [math.nan, 1.0], math.inf),
        ([1.0, 1.0], [1.0, math.nan], math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
    ],
)
def test_how_far_apart(told, got, apart) -> None:
    item = expected(np.array(told, np.float32), 1, 0.0)
    assert difference(item, np.array(got, np.float32)) == apart


def test_a_tensor_that_is_known_by_some_of_its_elements() -> None:
    item = expected(np.arange(10).reshape(2, 5), 3, 0.0)
    got = np.arange(10).reshape(2, 5)
    assert difference(item, got) == 0
    got[1, 1] += 7
    assert difference(item, got) == 7, "the seventh element is one of them"
    got[1, 1] -= 7
    got[1, 2] += 7
    assert difference(item, got) == 0, "the eighth is not"
