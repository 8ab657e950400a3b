"""A version is served when it gives what its own verifier vectors say; one that does not is refused by what differs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2, vectors_pb2
from conveyor_proto.vectors import METADATA_KEY, dump_vectors, expected
from conveyor_server.errors import Refused
from conveyor_server.repository import Repository
from conveyor_server.repository.vectors import NotAsVerified, check
from conveyor_server.runner.base import Run, Runner, RunResult

Served = tuple[str, str, Runner]
TABLE = np.arange(14, dtype=np.float32).reshape(7, 2)


def vectors_of(*sequences: list[int]) -> vectors_pb2.VerifierVectors:
    found = vectors_pb2.VerifierVectors(vectors_version=1)
    for tokens in sequences:
        found.vectors.add(
            time_steps=len(tokens),
            inputs=[np.array(tokens, np.int64).tobytes()],
            outputs=[expected(TABLE[tokens], 1, 1e-5)],
            states=[expected(TABLE[tokens].sum(axis=0), 1, 1e-5)],
        )
    return found


@pytest.fixture
def put(add: Callable[..., Path], model_proto: onnx.ModelProto) -> Callable[[str], Path]:
    """A version with such a text as its vectors."""

    def with_text(text: str) -> Path:
        model_proto.metadata_props.add(key=METADATA_KEY, value=text)
        return add("sum", "1", model_proto)

    return with_text


def test_a_version_that_gives_what_its_vectors_say(put, repository: Repository[Served]) -> None:
    # Of one length: this model takes no heed of padding.
    put(dump_vectors(vectors_of([1, 2, 3, 4, 5], [6, 5, 4, 3, 2])))
    assert repository.prepare("sum", "1").checked == 2


def test_a_version_without_vectors_is_served_and_not_checked(add, repository: Repository[Served]) -> None:
    add("sum", "1")
    assert repository.prepare("sum", "1").checked == 0


@pytest.mark.parametrize("tensor", ["y", "sum"])
def test_a_version_that_gives_something_else(put, repository: Repository[Served], tensor: str) -> None:
    vectors = vectors_of([1, 2, 3], [4, 5, 6])
    if tensor == "y":
        wrong = TABLE[[4, 5, 6]].copy()
        wrong[2, 1] += 0.25
        vectors.vectors[1].outputs[0].CopyFrom(expected(wrong, 1, 1e-5))
    else:
        vectors.vectors[1].states[0].CopyFrom(expected(TABLE[[4, 5, 6]].sum(axis=0) + 0.25, 1, 1e-5))
    put(dump_vectors(vectors))
    with pytest.raises(Refused) as refused:
        repository.prepare("sum", "1")
    fault = refused.value.fault
    assert fault.reason == e.ERROR_REASON_MODEL_INVALID
    assert f"{tensor!r} differs by 0.25 from what PyTorch gave (verifier vector 2), and 1e-05" in fault.message
    assert (fault.metadata["tensor"], fault.metadata["difference"]) == (tensor, "0.25")


def test_what_is_within_the_tolerance_passes(put, repository: Repository[Served]) -> None:
    vectors = vectors_of([1, 2, 3])
    vectors.vectors[0].states[0].CopyFrom(expected(TABLE[[1, 2, 3]].sum(axis=0) + 0.25, 1, 0.25))
    put(dump_vectors(vectors))
    assert repository.prepare("sum", "1").checked == 1


@pytest.mark.parametrize("text", ["nonsense", '{"vectors_version": 1}', "x" * 1_000_000])
def test_vectors_that_cannot_be_read_are_a_bad_file(put, repository: Repository[Served], text: str) -> None:
    put(text)
    with pytest.raises(Refused) as refused:
        repository.prepare("sum", "1")
    assert refused.value.fault.reason == e.ERROR_REASON_MODEL_INVALID
    assert "model.onnx: " in refused.value.fault.message


class Counter:
    """Counts the time steps of each row; a run is noted as (rows, most time steps)."""

    device = "cpu"

    def __init__(self, vectors: vectors_pb2.VerifierVectors, spec: spec_pb2.ModelSpec, capacity: int) -> None:
        self.vectors, self.spec, self.capacity = vectors, spec, capacity
        self.slab = np.full((capacity, 2), np.nan, np.float32)
        self.runs: list[tuple[int, int]] = []

    def step(self, run: Run) -> RunResult:
        assert not set(run.sources[~run.fresh]) & set(run.destinations)
        [tokens] = run.inputs
        self.runs.append(tokens.shape)
        y = TABLE[tokens]
        old = np.where(run.fresh[:, None], 0, self.slab[run.sources])
        valid = np.arange(tokens.shape[1]) < run.lengths[:, None]
        self.slab[run.destinations] = old + np.where(valid[..., None], y, 0).sum(axis=1)
        y[~valid] = np.nan
        return RunResult([y], np.ones(len(tokens), np.bool_))

    def read_rows(self, slots: list[int]) -> list[np.ndarray]:
        return [self.slab[slots]]


@pytest.mark.parametrize(
    ("capacity", "rows", "time_steps", "runs"),
    [
        (100, 0, 0, [(3, 3), (2, 2)]),
        (4, 0, 0, [(2, 3), (2, 2), (1, 1)]),
        (100, 1, 0, [(1, 3), (1, 2), (1, 2), (1, 1), (1, 1)]),
        (100, 0, 1, [(3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]),
    ],
)
def test_vectors_run_as_sessions_do_within_what_the_model_takes(capacity, rows, time_steps, runs, model_spec) -> None:
    model_spec.max_rows, model_spec.max_time_steps_per_run = rows, time_steps
    runner = Counter(vectors_of([1, 2, 3, 4, 5], [6, 5, 4], [2]), model_spec, capacity)
    assert check(runner) == 3
    assert runner.runs == runs


def test_of_several_that_differ_the_furthest_by_its_tolerance_is_told(model_spec) -> None:
    vectors = vectors_of([1, 2], [3, 4])
    vectors.vectors[0].states[0].CopyFrom(expected(np.array([100, 100], np.float32), 1, 90.0))
    vectors.vectors[1].outputs[0].CopyFrom(expected(TABLE[[3, 5]], 1, 0.5))
    with pytest.raises(NotAsVerified) as failed:
        check(Counter(vectors, model_spec, 8))
    miss = failed.value.miss
    assert (miss.tensor, miss.vector, miss.difference, miss.tolerance) == ("y", 2, 2.0, 0.5)
