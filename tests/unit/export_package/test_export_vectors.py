"""What PyTorch gives goes into the file in small, and a server finds by it whether the file computes that."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conveyor_export import export, package
from conveyor_export.vectors import TIME_STEPS, make_vectors
from conveyor_export.verify import verify
from conveyor_proto.codec import to_data_type
from conveyor_proto.v1 import spec_pb2, vectors_pb2
from conveyor_proto.vectors import MAX_BYTES, METADATA_KEY, check_vectors, parse_vectors, vectors_bytes
from conveyor_server.repository.vectors import NotAsVerified, check
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import read_step_file
from onnx import numpy_helper
from torch import nn


def _read(file: Path) -> vectors_pb2.VerifierVectors:
    proto = onnx.load(file)
    [text] = [item.value for item in proto.metadata_props if item.key == METADATA_KEY]
    return parse_vectors(text, package.spec_of(proto, file))


def _checked(file: Path, *, shares_memory: bool = True) -> int:
    runner = OnnxRunner(read_step_file(file), Host("cpu", 1, shares_memory), 8)
    try:
        return check(runner)
    finally:
        runner.close()


@pytest.fixture
def written(any_kind: Any, tmp_path: Path) -> Path:
    """A file with vectors, of each kind of layer."""
    vectors = make_vectors(any_kind.model, tolerance=1e-5)
    return package.write(any_kind.model, verify(any_kind.model), tmp_path / "tagger" / "1", vectors=vectors)


def test_they_are_of_each_length_and_the_same_each_time(any_kind: Any, written: Path) -> None:
    vectors = _read(written)
    assert tuple(vector.time_steps for vector in vectors.vectors) == TIME_STEPS
    assert vectors == make_vectors(any_kind.model, tolerance=1e-5)
    assert vectors != make_vectors(any_kind.model, tolerance=1e-5, seed=1)
    assert all(item.every == 1 for vector in vectors.vectors for item in (*vector.outputs, *vector.states))
    assert {item.tolerance for vector in vectors.vectors for item in vector.outputs} == {1e-5}
    example = np.frombuffer(vectors.vectors[3].inputs[0], np.float32)
    assert (example == any_kind.model.example["x"][0, :8].reshape(-1)).all()


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_server_finds_the_file_as_it_was_verified(written: Path, shares_memory: bool) -> None:
    """On the CPU, and in the way of a device that has memory of its own."""
    assert _checked(written, shares_memory=shares_memory) == len(TIME_STEPS)


@pytest.mark.parametrize("weight", ["R", "head_b"])
def test_a_server_finds_weights_that_were_changed(written: Path, weight: str) -> None:
    proto = onnx.load(written)
    [tensor] = [item for item in proto.graph.initializer if item.name == weight]
    changed = numpy_helper.to_array(tensor).copy()
    changed.reshape(-1)[0] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(changed, weight))
    written.write_bytes(proto.SerializeToString())
    with pytest.raises(NotAsVerified, match="differs by"):
        _checked(written)


def test_the_tolerance_is_the_verifiers_and_leaves_room_to_round(handmade: Callable[[str], Any]) -> None:
    model = handmade("gru").model
    strict, loose = make_vectors(model, tolerance=0.0), make_vectors(model, tolerance=0.5)
    assert strict is not None
    assert loose is not None
    assert [item.tolerance for item in strict.vectors[0].states] == [1e-5]
    assert [item.tolerance for item in loose.vectors[0].states] == [0.5]

    def grown(_: Any, answer: Any) -> Any:
        return replace(answer, outputs={name: array * 1000 for name, array in answer.outputs.items()})

    large = make_vectors(handmade("gru").with_reference(grown), tolerance=0.0)
    assert large is not None
    largest = np.abs(np.frombuffer(large.vectors[0].outputs[0].values, np.float32)).max()
    assert large.vectors[0].outputs[0].tolerance == pytest.approx(1e-5 * float(largest))


class Wide(nn.Module):
    """Inputs of many values a time step, a large state, and more outputs yet."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 9000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


def test_a_large_model_has_short_vectors_and_knows_its_tensors_by_some_elements(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(Wide(900, 64), torch.randn(1, 6, 900), tmp_path / "wide" / "1", quiet=True)
    file = tmp_path / "wide" / "1" / "model.onnx"
    vectors = _read(file)
    assert [vector.time_steps for vector in vectors.vectors] == [3, 1, 1, 1]
    assert vectors.vectors[0].outputs[0].every > 1
    assert MAX_BYTES * 0.6 < vectors_bytes(vectors) <= MAX_BYTES
    assert _checked(file) == 4


def test_where_one_time_step_is_too_large_there_are_none(handmade: Callable[[str], Any]) -> None:
    model = handmade("gru").model
    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(model.spec)
    spec.inputs.add(name="huge", dtype=to_data_type(np.dtype(np.float32)), shape=[9000], has_time=True)
    example = {**model.example, "huge": np.zeros((2, 9, 9000), np.float32)}
    assert make_vectors(replace(model, spec=spec, example=example), tolerance=1e-5) is None


def test_what_many_tensors_share_is_enough(handmade: Callable[[str], Any]) -> None:
    """256 outputs: each is known by the few elements that there is room for."""
    model = handmade("gru").model
    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(model.spec)
    for number in range(255):
        spec.outputs.add().CopyFrom(spec.outputs[0])
        spec.outputs[-1].name = f"more {number}"

    def more(inputs: Any) -> Any:
        answer = model.reference(inputs)
        return replace(answer, outputs={item.name: answer.outputs["logits"] for item in spec.outputs})

    vectors = make_vectors(replace(model, spec=spec, reference=more), tolerance=1e-5)
    assert vectors is not None
    check_vectors(vectors, spec)
    assert 0 < vectors.vectors[0].outputs[255].every < 24
