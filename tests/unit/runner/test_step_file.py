"""A file is read and compared with its ModelSpec without being run; what is wrong is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_proto import spec as specs
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.step_file import read_step_file
from onnx import TensorProto, helper, numpy_helper

Make = Callable[..., Any]


@pytest.fixture
def lstm(recurrent: Make) -> onnx.ModelProto:
    return recurrent("lstm")


def test_a_good_file(lstm: onnx.ModelProto, save: Make) -> None:
    file = read_step_file(save(lstm))
    assert file.opset == 20
    assert [state.name for state in file.spec.states] == ["l0.hidden", "l0.cell"]


def _respec(proto: onnx.ModelProto, **changes: Any) -> None:
    """Changes the first input, the first state or a field of the ModelSpec in the file."""
    spec = specs.parse_spec(proto.metadata_props[0].value)
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        item: Any = {"": spec, "input": spec.inputs[0], "output": spec.outputs[0], "state": spec.states[0]}[part]
        if isinstance(value, list):
            del getattr(item, name)[:]
            getattr(item, name).extend(value)
        else:
            setattr(item, name, value)
    spec.state_bytes = sum(map(specs.state_row_bytes, spec.states))
    proto.metadata_props[0].value = specs.dump_spec(spec)


def _reshape(value: onnx.ValueInfoProto, *shape: int | str | None) -> None:
    fixed = helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape)
    value.type.CopyFrom(fixed.type)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda p: _respec(p, input__name="audio"),
            "input 'audio' is not in the graph; the graph has input 'x', which",
        ),
        (lambda p: _respec(p, output__name="z"), "output 'z' is not in the graph; the graph has output 'y', which"),
        (lambda p: _respec(p, state__input_name="h"), "input 'h' is not in the graph"),
        (lambda p: _respec(p, lengths_input="len"), "input 'len' is not in the graph"),
        (lambda p: _respec(p, input__dtype=2), "input 'x' is float64 in the spec and float in the graph"),
        (lambda p: _respec(p, input__has_time=False), "a model needs at least one input with a time axis"),
        (lambda p: _respec(p, output__has_time=False), r"output 'y' is \[any, 3\] in the spec and \[any, any, 3\]"),
        (lambda p: _respec(p, input__shape=[6]), r"input 'x' is \[any, any, 6\] in the spec and \[any, any, 5\] in"),
        (lambda p: _respec(p, state__shape=[8, 2]), r"'l0.hidden_in' is \[any, 8, 2\] in the spec and \[any, 16\]"),
        (lambda p: _respec(p, state__shape=[0]), "every dimension must be at least 1"),
        (lambda p: _respec(p, lengths_input=""), "has state but no lengths input"),
        (lambda p: _respec(p, spec_version=9), "spec_version 9 is not 1"),
        (lambda p: _reshape(p.graph.input[0], 1, "time", 5), r"\[any, any, 5\] in the spec and \[1, any, 5\]"),
        (lambda p: _reshape(p.graph.input[0], "batch", 4, 5), r"\[any, any, 5\] in the spec and \[any, 4, 5\]"),
        (lambda p: p.graph.output.add(name="extra"), "the graph has output 'extra', which the spec does not"),
        (lambda p: p.metadata_props[0].ClearField("key"), "has no conveyor.spec: make it with `conveyor export`"),
        (lambda p: setattr(p.metadata_props[0], "value", "{"), "metadata conveyor.spec is not a ModelSpec"),
        (lambda p: _respec(p, input__dtype=0), "data type 0 is not one of DataType's"),
        (lambda p: setattr(p.opset_import[0], "version", 12), "has opset 12; 13 or newer is needed"),
        (lambda p: p.ClearField("opset_import"), "has no standard opset; 13 or newer is needed"),
        (
            lambda p: p.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent(),
            "input 'x' is not a tensor",
        ),
    ],
)
def test_a_file_that_disagrees_with_its_spec(
    change: Callable[[onnx.ModelProto], None], told: str, lstm: onnx.ModelProto, save: Make
) -> None:
    change(lstm)
    with pytest.raises(RunnerUnavailable, match=told):
        read_step_file(save(lstm))


def test_weights_listed_as_graph_inputs_too(lstm: onnx.ModelProto, save: Make) -> None:
    weight = lstm.graph.initializer[2]
    lstm.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    read_step_file(save(lstm))


def test_an_output_without_a_shape_is_inferred(lstm: onnx.ModelProto, save: Make) -> None:
    output = next(item for item in lstm.graph.output if item.name == "y")
    output.type.tensor_type.ClearField("shape")
    read_step_file(save(lstm))
    _respec(lstm, output__shape=[4])
    with pytest.raises(RunnerUnavailable, match=r"output 'y' is \[any, any, 4\] in the spec and \[any, any, 3\]"):
        read_step_file(save(lstm))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RunnerUnavailable, match=r"model.onnx is not there: export the model"):
        read_step_file(tmp_path / "model.onnx")
    with pytest.raises(RunnerUnavailable, match="cannot be read: Is a directory"):
        read_step_file(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not protobuf")
    with pytest.raises(RunnerUnavailable, match="is not an ONNX file, or is cut short"):
        read_step_file(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(RunnerUnavailable, match="has no standard opset"):
        read_step_file(tmp_path / "model.onnx")


def test_a_file_cut_short(lstm: onnx.ModelProto, save: Make) -> None:
    path = save(lstm)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RunnerUnavailable, match=r"cut short|no conveyor.spec"):
        read_step_file(path)


def _external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _as_initializer(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.initializer.append(tensor)


def _as_constant(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_a_subgraph(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor])
    flag = numpy_helper.from_array(np.array(True), "flag")
    proto.graph.initializer.append(flag)
    proto.graph.node.append(helper.make_node("If", ["flag"], ["c"], then_branch=inner, else_branch=inner))


def _in_a_function(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    proto.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 20)]))


def _as_sparse(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[1]))


@pytest.mark.parametrize("place", [_as_initializer, _as_constant, _in_a_subgraph, _in_a_function, _as_sparse])
@pytest.mark.parametrize("location", ["/etc/passwd", "../other/weights", "a/../../b", "..\\b", ""])
def test_weights_outside_the_folder_are_refused_before_loading(
    location: str, place: Callable[[onnx.ModelProto, onnx.TensorProto], None], lstm: onnx.ModelProto, save: Make
) -> None:
    place(lstm, _external(location))
    with pytest.raises(RunnerUnavailable, match="only files of the model's own folder"):
        read_step_file(save(lstm))


def test_weights_behind_a_link_out_of_the_folder(lstm: onnx.ModelProto, save: Make, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_bytes(b"\0" * 4)
    _as_initializer(lstm, _external("weights.data"))
    path = save(lstm)
    with pytest.raises(RunnerUnavailable, match=r"weights file 'weights.data' is missing: copy it beside"):
        read_step_file(path)
    inner = tmp_path / "inner"
    inner.mkdir()
    path = path.rename(inner / "model.onnx")
    (inner / "weights.data").symlink_to(outside / "weights")
    with pytest.raises(RunnerUnavailable, match="a link out of the model's folder"):
        read_step_file(path)
