"""What the verifier feeds, and outputs and inputs that have no time axis."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_export.errors import VerificationFailed
from conveyor_export.step_model import Reference, StepModel
from conveyor_export.verify import verify
from conveyor_export.verify_inputs import random_sample
from conveyor_export.verify_modes import ragged_schedule
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 11


def _embedded(made: Any, example: np.ndarray) -> StepModel:
    """The step model behind an embedding: token ids instead of features."""
    table = np.random.default_rng(2).standard_normal((VOCABULARY, 3)).astype(np.float32)

    def embed(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("token", TensorProto.INT64, ["batch", "time"]))
        proto.graph.initializer.append(numpy_helper.from_array(table, "table"))
        proto.graph.node.insert(0, helper.make_node("Gather", ["table", "same_token"], ["x"]))
        proto.graph.node.insert(0, helper.make_node("Identity", ["token"], ["same_token"]))

    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(made.model.spec)
    spec.inputs[0].CopyFrom(spec_pb2.TensorSpec(name="token", dtype=tensor_pb2.DATA_TYPE_INT64, has_time=True))
    original = made.model.reference

    def reference(inputs: Mapping[str, np.ndarray]) -> Reference:
        return original({"x": table[inputs["token"]]})

    return replace(made.with_graph(embed), spec=spec, reference=reference, example={"token": example})


def _last_step(made: Any) -> StepModel:
    """The step model with `y[:, -1]` as output: a gather at lengths - 1."""

    def last(proto: onnx.ModelProto) -> None:
        next(node for node in proto.graph.node if node.name == "head").output[0] = "every"
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2]))
        proto.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "two"))
        proto.graph.node.extend(
            [
                helper.make_node("Cast", ["lengths"], ["long"], to=TensorProto.INT64),
                helper.make_node("Sub", ["long", "one"], ["at_or_before"]),
                helper.make_node("Max", ["at_or_before", "zero"], ["at"]),
                helper.make_node("Unsqueeze", ["at", "one"], ["at_column"]),
                helper.make_node("GatherND", ["every", "at_column"], ["logits"], batch_dims=1, name="last"),
            ]
        )

    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(made.model.spec)
    spec.outputs[0].has_time = False

    def module(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        return replace(answer, outputs={"logits": answer.outputs["logits"][:, -1]})

    return replace(made.with_graph(last), spec=spec, reference=made.with_reference(module).reference)


def test_random_tokens_cover_the_table_even_where_the_example_is_all_zeros(any_kind: Any) -> None:
    model = _embedded(any_kind, np.zeros((1, 6), np.int64))
    sample = random_sample(model, np.random.default_rng(0))
    tokens = sample.inputs["token"]
    assert tokens.dtype == np.int64
    assert tokens.min() >= 0
    assert VOCABULARY > tokens.max() > 0
    assert max(case.max_abs_difference for case in verify(model).cases) <= 1e-5


def test_integers_that_index_nothing_are_drawn_from_the_example(handmade: Callable[[str], Any]) -> None:
    model = _embedded(handmade("gru"), np.array([[3, 5, 3]], np.int64))
    for node in model.proto.graph.node:
        if node.op_type == "Gather":
            node.op_type = "Elsewhere"
    assert set(random_sample(model, np.random.default_rng(0)).inputs["token"].ravel()) == {3, 5}


def test_float_inputs_are_of_unit_scale(handmade: Callable[[str], Any]) -> None:
    x = random_sample(handmade("gru").model, np.random.default_rng(0)).inputs["x"]
    assert x.dtype == np.float32
    assert 0.8 < x.std() < 1.2


def test_random_sequences_exceed_a_convolutions_context(handmade: Callable[[str], Any]) -> None:
    model = handmade("gru").model
    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(model.spec)
    spec.states[0].role = spec_pb2.STATE_ROLE_CONTEXT
    spec.states[0].shape[:] = [1, 30]
    assert random_sample(replace(model, spec=spec), np.random.default_rng(0)).time == 60


def test_example_of_one_row_and_one_step_is_enough(any_kind: Any) -> None:
    model = replace(any_kind.model, example={"x": np.ones((1, 1, 3), np.float32)})
    assert {case.mode for case in verify(model).cases if case.inputs == "example"} == {
        "whole",
        "alone",
        "chunked",
        "one-by-one",
        "ragged",
    }


def test_output_without_time_is_compared_at_the_end_of_each_prefix(any_kind: Any) -> None:
    model = _last_step(any_kind)
    cases = {case.mode: case for case in verify(model).cases if case.tensor == "logits" and case.inputs == "random"}
    assert cases["whole"].time_steps == 4
    assert cases["one-by-one"].time_steps >= 4 * 5


def test_output_without_time_that_ignores_lengths_is_caught(any_kind: Any) -> None:
    model = _last_step(any_kind)
    proto = model.proto
    proto.graph.initializer.append(numpy_helper.from_array(np.array(-1, np.int64), "end"))
    last = next(node for node in proto.graph.node if node.name == "last")
    last.CopyFrom(helper.make_node("Gather", ["every", "end"], ["logits"], axis=1))
    with pytest.raises(VerificationFailed, match="mode 'ragged'"):
        verify(model)


def test_module_undefined_on_the_whole_line_is_verified_on_its_own_values(any_kind: Any) -> None:
    """log(x) has no answer to negative numbers; the example holds positive ones."""

    def take_log(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = "energy"
        proto.graph.node.insert(0, helper.make_node("Log", ["energy"], ["x"]))

    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(any_kind.model.spec)
    spec.inputs[0].name = "energy"
    original = any_kind.model.reference

    def reference(inputs: Mapping[str, np.ndarray]) -> Reference:
        with np.errstate(invalid="ignore"):
            return original({"x": np.log(inputs["energy"])})

    example = {"energy": np.random.default_rng(0).uniform(0.1, 2, (2, 8, 3)).astype(np.float32)}
    model = replace(any_kind.with_graph(take_log), spec=spec, reference=reference, example=example)
    assert {case.inputs for case in verify(model).cases} == {"resampled", "example"}


@given(batch=st.integers(3, 6), time=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_ragged_schedule_feeds_every_row_and_lets_rows_wait(batch: int, time: int, seed: int) -> None:
    schedule = ragged_schedule(batch, time, np.random.default_rng(seed))
    totals = schedule.sum(axis=0)
    assert totals[0] == time
    assert (totals >= 1).all()
    assert (totals <= time).all()
    assert (schedule >= 0).all()
    assert (schedule.sum(axis=1) > 0).all(), "a call of nothing"
    assert schedule[0, 0] == 0, "a fresh row waits"
    assert schedule[0, 1] > 0
    assert schedule[1, 1] == 0, "a row that has begun waits"
