"""The verifier passes what is right and says what is wrong."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_export.errors import ExportError, VerificationFailed
from conveyor_export.step_model import Reference
from conveyor_export.verify import verify
from onnx import numpy_helper

MODES = {"whole", "alone", "chunked", "one-by-one", "ragged"}


def _weight(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def _set_weight(proto: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    _weight(proto, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def _node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def test_right_graph_passes_in_every_mode_and_is_recorded(any_kind: Any) -> None:
    figures = verify(any_kind.model)
    tensors = {"logits", *(state.name for state in any_kind.model.spec.states)}
    seen = {(case.mode, case.inputs, case.tensor) for case in figures.cases}
    assert seen == {(mode, inputs, tensor) for mode in MODES for inputs in ("random", "example") for tensor in tensors}
    assert all(case.max_abs_difference <= 1e-5 for case in figures.cases)
    assert all(case.time_steps > 0 for case in figures.cases)
    whole = {case.inputs: case.time_steps for case in figures.cases if case.mode == "whole" and case.tensor == "logits"}
    assert whole == {"random": 4 * 17, "example": 2 * 9}
    assert figures.tolerance == 1e-5
    assert figures.onnxruntime_version


def test_difference_is_measured_not_assumed(any_kind: Any) -> None:
    """The figures are of this graph: a known shift of the output comes back as that number."""

    def shift(proto: onnx.ModelProto) -> None:
        _set_weight(proto, "head_b", numpy_helper.to_array(_weight(proto, "head_b")) + np.float32(0.25))

    figures = verify(any_kind.with_graph(shift), tolerance=0.5)
    cases = {(case.mode, case.tensor): case.max_abs_difference for case in figures.cases}
    assert cases["ragged", "logits"] == pytest.approx(0.25, abs=1e-5)
    assert cases["alone", "logits"] < 1e-5
    assert cases["whole", "rnn.0.hidden"] < 1e-5


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_permuted_gates_name_output_and_first_layer(handmade: Callable[[str], Any], kind: str) -> None:
    made = handmade(kind)

    def permute(proto: onnx.ModelProto) -> None:
        gates = np.split(numpy_helper.to_array(_weight(proto, "W")), 4 if kind == "lstm" else 3, axis=1)
        _set_weight(proto, "W", np.concatenate([gates[1], gates[0], *gates[2:]], axis=1))

    with pytest.raises(VerificationFailed) as failed:
        verify(made.with_graph(permute))
    message = str(failed.value)
    assert "mode 'whole'" in message
    assert "output 'logits' differs by" in message
    assert "tolerance 1e-05" in message
    assert "first that differs: layer 'rnn.0', state 'rnn.0.hidden'" in message
    assert "weights or options were read wrongly" in message
    assert failed.value.verification is not None
    assert any(case.max_abs_difference > 1e-5 for case in failed.value.verification.cases)


def test_wrong_activation_of_an_rnn_is_caught(handmade: Callable[[str], Any]) -> None:
    def tanh(proto: onnx.ModelProto) -> None:
        node = _node(proto, "recurrent")
        del node.attribute[next(i for i, item in enumerate(node.attribute) if item.name == "activations")]

    with pytest.raises(VerificationFailed, match=r"'rnn\.0\.hidden' differs"):
        verify(handmade("rnn_relu").with_graph(tanh))


def test_difference_after_the_layers_says_so(any_kind: Any) -> None:
    def shift(proto: onnx.ModelProto) -> None:
        _set_weight(proto, "head_b", numpy_helper.to_array(_weight(proto, "head_b")) + np.float32(0.25))

    with pytest.raises(VerificationFailed, match="every state agrees: the difference arises after the last recurrent"):
        verify(any_kind.with_graph(shift))


def test_module_that_uses_the_whole_input_is_caught_although_whole_agrees(any_kind: Any) -> None:
    """The graph subtracts the mean over the time steps of one call, as the module does over the whole sequence."""

    def subtract_mean(proto: onnx.ModelProto) -> None:
        _node(proto, "head").output[0] = "raw"
        proto.graph.node.extend(
            [
                onnx.helper.make_node("ReduceMean", ["raw", "one"], ["mean"], keepdims=1),
                onnx.helper.make_node("Sub", ["raw", "mean"], ["logits"]),
            ]
        )

    def module(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        logits = answer.outputs["logits"]
        return replace(answer, outputs={"logits": logits - logits.mean(axis=1, keepdims=True)})

    model = replace(any_kind.with_graph(subtract_mean), reference=any_kind.with_reference(module).reference)
    with pytest.raises(VerificationFailed) as failed:
        verify(model)
    message = str(failed.value)
    assert "chunked differs from whole although whole agrees" in message
    assert "uses the future or the whole input" in message
    assert failed.value.verification is not None
    worst = {case.mode: case.max_abs_difference for case in failed.value.verification.cases if case.tensor == "logits"}
    assert worst["whole"] < 1e-5
    assert worst["one-by-one"] > 1e-2


def test_state_that_is_not_carried_is_caught(any_kind: Any) -> None:
    def forget(proto: onnx.ModelProto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
        proto.graph.node.insert(0, onnx.helper.make_node("Mul", ["hidden_in", "nothing"], ["hidden_forgotten"]))
        for node in proto.graph.node[1:]:
            if node.op_type == "Unsqueeze" and node.input[0] == "hidden_in":
                node.input[0] = "hidden_forgotten"

    with pytest.raises(VerificationFailed, match="the graph forgets something from call to call"):
        verify(any_kind.with_graph(forget))


def test_row_without_time_steps_must_keep_its_state(any_kind: Any) -> None:
    def lose(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            if node.op_type == "Where":
                node.input[2] = node.input[1]

    with pytest.raises(VerificationFailed, match="a row without new time steps loses its state") as failed:
        verify(any_kind.with_graph(lose))
    assert "mode 'ragged'" in str(failed.value)


def test_padding_must_reach_nothing(any_kind: Any) -> None:
    """Without lengths at the operator, the state is taken after the padding. A GRU shows it only on finite padding."""

    def ignore_lengths(proto: onnx.ModelProto) -> None:
        _node(proto, "recurrent").input[4] = ""

    with pytest.raises(VerificationFailed, match="padding reaches a row's answers"):
        verify(any_kind.with_graph(ignore_lengths))


def test_padding_times_zero_is_still_nan(any_kind: Any) -> None:
    """A mask that multiplies is right on finite padding and passes NaN on."""

    def add_masked_sum(proto: onnx.ModelProto) -> None:
        """logits + 0 * (sum over the features and time steps of x), as a mask by multiplication would."""
        _node(proto, "head").output[0] = "raw"
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
        proto.graph.node.extend(
            [
                onnx.helper.make_node("Mul", ["x", "nothing"], ["masked"]),
                onnx.helper.make_node("ReduceSum", ["masked"], ["sum"], keepdims=0),
                onnx.helper.make_node("Add", ["raw", "sum"], ["logits"]),
            ]
        )

    with pytest.raises(VerificationFailed, match="onnxruntime gives NaN"):
        verify(any_kind.with_graph(add_masked_sum))


def test_rows_that_see_each_other_are_caught(any_kind: Any) -> None:
    def mix(proto: onnx.ModelProto) -> None:
        _node(proto, "head").output[0] = "raw"
        proto.graph.node.extend(
            [
                onnx.helper.make_node("ReduceMean", ["raw", "zero"], ["mean"], keepdims=1),
                onnx.helper.make_node("Sub", ["raw", "mean"], ["logits"]),
            ]
        )

    def module(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        logits = answer.outputs["logits"]
        return replace(answer, outputs={"logits": logits - logits.mean(axis=0, keepdims=True)})

    model = replace(any_kind.with_graph(mix), reference=any_kind.with_reference(module).reference)
    with pytest.raises(VerificationFailed, match="depend on the other rows of its batch"):
        verify(model)


def test_module_that_draws_random_numbers_is_told_apart(any_kind: Any) -> None:
    rng = np.random.default_rng(0)

    def noisy(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        noise = rng.standard_normal(answer.outputs["logits"].shape).astype(np.float32)
        return replace(answer, outputs={"logits": answer.outputs["logits"] + noise})

    with pytest.raises(VerificationFailed, match="draws random numbers"):
        verify(any_kind.with_reference(noisy))


def test_nan_from_pytorch_is_a_failure_even_where_the_graph_agrees(any_kind: Any) -> None:
    def poison(proto: onnx.ModelProto) -> None:
        _set_weight(proto, "head_b", np.full(2, np.nan, np.float32))

    def module(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        return replace(answer, outputs={"logits": np.full_like(answer.outputs["logits"], np.nan)})

    model = replace(any_kind.with_graph(poison), reference=any_kind.with_reference(module).reference)
    with pytest.raises(VerificationFailed, match="PyTorch itself gives NaN"):
        verify(model, tolerance=1e9)


def test_rounding_on_large_values_suggests_a_tolerance(any_kind: Any) -> None:
    scale = np.float32(1e6)

    def enlarge(proto: onnx.ModelProto) -> None:
        for name in ("head_w", "head_b"):
            _set_weight(proto, name, numpy_helper.to_array(_weight(proto, name)) * scale)

    def module(_: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        return replace(answer, outputs={"logits": answer.outputs["logits"] * scale})

    model = replace(any_kind.with_graph(enlarge), reference=any_kind.with_reference(module).reference)
    with pytest.raises(VerificationFailed, match=r"float32 rounding makes.*set a tolerance such as [0-9.]+"):
        verify(model)


def test_user_inputs_are_verified_too(any_kind: Any) -> None:
    """A module that saturates beyond what random inputs reach differs only on the inputs that the user knows of."""

    def saturate(inputs: Mapping[str, np.ndarray], answer: Reference) -> Reference:
        logits = answer.outputs["logits"].copy()
        logits[np.abs(inputs["x"]).max(axis=2) > 50] = 0
        return replace(answer, outputs={"logits": logits})

    model = any_kind.with_reference(saturate)
    given = {"x": np.full((1, 4, 3), 60, np.float32)}
    verify(model)
    with pytest.raises(VerificationFailed, match="given inputs"):
        verify(model, extra_inputs=[given])
    figures = verify(any_kind.model, extra_inputs=[given, {"x": given["x"] / 60}])
    steps = {case.time_steps for case in figures.cases if case.inputs == "given" and case.mode == "one-by-one"}
    assert steps == {2, 2 * 4}  # states once per row and set, outputs at every time step


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": np.zeros((1, 4, 3), np.float32)}, r"given inputs name \['y'\], and the model takes \['x'\]"),
        ({"x": np.zeros((1, 4, 3))}, "float64"),
        ({"x": np.zeros((1, 4, 7), np.float32)}, r"\[1, 4, 7\]"),
        ({"x": np.zeros((1, 3), np.float32)}, r"\[batch, time, 3\]"),
        ({"x": np.zeros((1, 0, 3), np.float32)}, "at least 1"),
    ],
)
def test_user_inputs_of_another_shape_are_refused(
    handmade: Callable[[str], Any], inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(VerificationFailed, match=message):
        verify(handmade("gru").model, extra_inputs=[inputs])


def test_module_that_fixes_its_batch_is_explained(any_kind: Any) -> None:
    original = any_kind.model.reference

    def fixed(inputs: Mapping[str, np.ndarray]) -> Reference:
        if len(inputs["x"]) != 2:
            raise RuntimeError("size mismatch")
        return original(inputs)

    with pytest.raises(VerificationFailed, match=r"on a batch of 4 and 17 time steps .* raised RuntimeError"):
        verify(replace(any_kind.model, reference=fixed))


def test_graph_with_a_fixed_time_axis_is_caught(any_kind: Any) -> None:
    def freeze(proto: onnx.ModelProto) -> None:
        _node(proto, "head").output[0] = "raw"
        proto.graph.initializer.append(numpy_helper.from_array(np.array([-1, 17, 2], np.int64), "frozen"))
        proto.graph.node.append(onnx.helper.make_node("Reshape", ["raw", "frozen"], ["logits"]))

    with pytest.raises(VerificationFailed, match="onnxruntime refused the captured graph's inputs"):
        verify(any_kind.with_graph(freeze))


def test_graph_that_onnxruntime_cannot_load_is_a_failed_verification(any_kind: Any) -> None:
    def unknown(proto: onnx.ModelProto) -> None:
        _node(proto, "head").op_type = "Subtrahend"

    with pytest.raises(VerificationFailed, match="onnxruntime cannot load"):
        verify(any_kind.with_graph(unknown))


def test_graph_and_description_must_name_the_same(handmade: Callable[[str], Any]) -> None:
    model = handmade("lstm").model
    spec = type(model.spec)()
    spec.CopyFrom(model.spec)
    del spec.states[1]
    with pytest.raises(VerificationFailed, match="its description says"):
        verify(replace(model, spec=spec))


def test_a_failed_verification_is_an_export_error() -> None:
    assert issubclass(VerificationFailed, ExportError)


def test_same_seed_gives_the_same_figures(handmade: Callable[[str], Any]) -> None:
    model = handmade("lstm").model
    assert verify(model, seed=3) == verify(model, seed=3)
