"""A written model is whole, describes itself, tells no secrets, and is never half there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conveyor_export import package
from conveyor_export.errors import ExportError, WriteRefused
from conveyor_export.package_graph import digest, externalize, strip, weights_bytes
from conveyor_export.verify import verify
from conveyor_export.verify_graph import Graph
from conveyor_proto.spec import METADATA_KEY
from conveyor_proto.v1 import spec_pb2
from onnx import numpy_helper

PRIVATE = "/home/someone/project/train.py"


@pytest.fixture
def large(handmade: Callable[[str], Any]) -> Any:
    """A step model with a weight that is worth a file of its own."""
    made = handmade("lstm")

    def grow(proto: onnx.ModelProto) -> None:
        big = np.arange(4096, dtype=np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(big, "big"))
        proto.graph.node.append(onnx.helper.make_node("Identity", ["big"], ["big_again"]))

    return made.with_graph(grow)


@pytest.fixture
def figures() -> spec_pb2.Verification:
    case = spec_pb2.VerificationCase(mode="whole", tensor="logits", max_abs_difference=1e-7, time_steps=3)
    return spec_pb2.Verification(tolerance=1e-5, onnxruntime_version="1", cases=[case])


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _run(file: Path) -> list[np.ndarray]:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {
        "x": np.random.default_rng(5).standard_normal((2, 4, 3)).astype(np.float32),
        "hidden_in": np.zeros((2, 5), np.float32),
        "cell_in": np.zeros((2, 5), np.float32),
        "lengths": np.array([4, 2], np.int32),
    }
    return session.run(["logits", "hidden_out"], feed)


def test_version_folder_is_made_and_read_back(any_kind: Any, tmp_path: Path) -> None:
    figures = verify(any_kind.model)
    file = package.write(any_kind.model, figures, tmp_path / "models" / "tagger" / "1")
    assert file == tmp_path / "models" / "tagger" / "1" / "model.onnx"
    assert _files(tmp_path) == {"models", "models/tagger", "models/tagger/1", "models/tagger/1/model.onnx"}
    onnx.checker.check_model(str(file), full_check=True)
    for place in (file, file.parent, file.parent.parent):
        spec, found = package.read(place)
        assert found == file
        assert spec.verification == figures
        assert spec.digest == digest(onnx.load(file))
        assert not spec.external_data
        spec.ClearField("verification")
        spec.ClearField("digest")
        assert spec == any_kind.model.spec


def test_highest_version_is_read_as_a_number(handmade: Callable[[str], Any], figures: Any, tmp_path: Path) -> None:
    for version in ("9", "10"):
        package.write(handmade("gru").model, figures, tmp_path / "tagger" / version)
    assert package.read(tmp_path / "tagger")[1].parent.name == "10"


def test_model_may_be_a_file(handmade: Callable[[str], Any], figures: Any, tmp_path: Path) -> None:
    file = package.write(handmade("lstm").model, figures, tmp_path / "tagger.onnx")
    assert _files(tmp_path) == {"tagger.onnx"}
    assert len(_run(file)) == 2


def test_given_model_is_left_as_it_was(large: Any, figures: Any, tmp_path: Path) -> None:
    before = large.proto.SerializeToString(deterministic=True), large.spec.SerializeToString(deterministic=True)
    package.write(large, figures, tmp_path / "1", external_data=True)
    after = large.proto.SerializeToString(deterministic=True), large.spec.SerializeToString(deterministic=True)
    assert after == before


def test_stack_traces_and_paths_are_stripped(handmade: Callable[[str], Any], figures: Any, tmp_path: Path) -> None:
    def betray(proto: onnx.ModelProto) -> None:
        proto.doc_string = proto.graph.doc_string = PRIVATE
        proto.metadata_props.add(key="source", value=PRIVATE)
        proto.graph.metadata_props.add(key="source", value=PRIVATE)
        for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
            part.doc_string = PRIVATE
            part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=PRIVATE)
        inner = onnx.helper.make_node("Identity", ["zero"], ["inner"], doc_string=PRIVATE)
        result = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.INT64, [1])
        branch = onnx.helper.make_graph([inner], "branch", [], [result], doc_string=PRIVATE)
        proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        proto.graph.node.append(
            onnx.helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch, doc_string=PRIVATE)
        )

    file = package.write(handmade("lstm").with_graph(betray), figures, tmp_path / "1")
    assert PRIVATE.encode() not in file.read_bytes()
    written = onnx.load(file)
    assert [item.key for item in written.metadata_props] == [METADATA_KEY]
    assert written.producer_name == "conveyor"


def test_digest_is_of_the_function_alone(large: Any, figures: Any, tmp_path: Path) -> None:
    inline = package.write(large, figures, tmp_path / "inline" / "1")
    beside = package.write(large, figures, tmp_path / "beside" / "1", external_data=True)
    renamed = package.write(large, spec_pb2.Verification(tolerance=1), tmp_path / "other.onnx", external_data=True)
    digests = {package.read(file)[0].digest for file in (inline, beside, renamed)}
    assert len(digests) == 1
    assert digests == {digest(onnx.load(inline)), digest(onnx.load(beside, load_external_data=False), beside.parent)}
    assert all(len(text) == 64 and text == text.lower() for text in digests)


@pytest.mark.parametrize("change", ["weight", "attribute", "opset", "type"])
def test_digest_changes_with_the_function(large: Any, change: str) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(large.proto)
    if change == "weight":
        tensor = changed.graph.initializer[0]
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[0] += np.float32(1e-6)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif change == "attribute":
        next(node for node in changed.graph.node if node.op_type == "Transpose").attribute[0].ints[:] = [0, 1, 2]
    elif change == "opset":
        changed.opset_import[0].version = 19
    else:
        tensor = changed.graph.initializer[0]
        tensor.data_type = onnx.TensorProto.INT32  # the same bytes
    assert digest(changed) != digest(large.proto)


def test_digest_does_not_depend_on_how_weights_are_stored(large: Any) -> None:
    typed = onnx.ModelProto()
    typed.CopyFrom(large.proto)
    tensor = typed.graph.initializer[0]
    values = numpy_helper.to_array(tensor)
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values.reshape(-1).tolist())
    assert digest(typed) == digest(large.proto)


def test_external_weights_lie_beside_and_the_model_runs(large: Any, figures: Any, tmp_path: Path) -> None:
    inline = package.write(large, figures, tmp_path / "inline" / "1")
    beside = package.write(large, figures, tmp_path / "beside" / "1", external_data=True)
    spec, _ = package.read(beside)
    assert _files(beside.parent) == {"model.onnx", spec.external_data}
    big = next(item for item in onnx.load(beside, load_external_data=False).graph.initializer if item.name == "big")
    entries = {item.key: item.value for item in big.external_data}
    assert entries["location"] == spec.external_data
    assert int(entries["offset"]) % 4096 == 0
    for one, other in zip(_run(inline), _run(beside), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_over_the_limit_go_beside_by_themselves(
    large: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "MAX_INLINE_BYTES", weights_bytes(large.proto) - 1)
    spec, file = package.read(package.write(large, figures, tmp_path / "1"))
    assert (file.parent / spec.external_data).stat().st_size >= 4096 * 4


def test_verifier_runs_weights_over_the_limit(handmade: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = handmade("lstm").model
    monkeypatch.setattr("conveyor_export.verify_graph.MAX_INLINE_BYTES", 1)
    graph = Graph(model)
    [call] = graph.play(model.example, np.full((1, 2), 9, np.int32), np.random.default_rng(0))
    np.testing.assert_allclose(call.outputs["logits"], model.reference(model.example).outputs["logits"], atol=1e-6)


def test_model_that_is_there_is_not_overwritten(large: Any, figures: Any, tmp_path: Path) -> None:
    file = package.write(large, figures, tmp_path / "1")
    before = file.read_bytes()
    with pytest.raises(WriteRefused, match=r"is there already.*--overwrite"):
        package.write(large, spec_pb2.Verification(tolerance=7), tmp_path / "1")
    assert file.read_bytes() == before
    package.write(large, spec_pb2.Verification(tolerance=7), tmp_path / "1", overwrite=True)
    assert package.read(file)[0].verification.tolerance == 7


def test_overwriting_takes_the_older_weights_away(large: Any, figures: Any, tmp_path: Path) -> None:
    package.write(large, figures, tmp_path / "1", external_data=True)
    other = onnx.ModelProto()
    other.CopyFrom(large.proto)
    big = next(item for item in other.graph.initializer if item.name == "big")
    big.CopyFrom(numpy_helper.from_array(np.ones(4096, np.float32), "big"))
    file = package.write(replace(large, proto=other), figures, tmp_path / "1", external_data=True, overwrite=True)
    assert _files(tmp_path / "1") == {"model.onnx", package.read(file)[0].external_data}
    package.write(large, figures, tmp_path / "1", overwrite=True)
    assert _files(tmp_path / "1") == {"model.onnx"}


@pytest.mark.parametrize("older", [False, True])
def test_failure_leaves_nothing_behind(
    large: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    if older:
        package.write(large, figures, tmp_path / "models" / "tagger" / "1")
    before = {path: (tmp_path / path).is_file() and (tmp_path / path).read_bytes() for path in _files(tmp_path)}
    replace_file = Path.replace

    def full(self: Path, goal: Path) -> Path:
        if goal.name == "model.onnx":
            raise OSError(28, "No space left on device")
        return replace_file(self, goal)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteRefused, match="No space left on device"):
        package.write(large, figures, tmp_path / "models" / "tagger" / "1", external_data=True, overwrite=True)
    assert {p: (tmp_path / p).is_file() and (tmp_path / p).read_bytes() for p in _files(tmp_path)} == before


def test_invalid_graph_is_not_written(handmade: Callable[[str], Any], figures: Any, tmp_path: Path) -> None:
    def break_it(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].input[0] = "nowhere"

    with pytest.raises(ExportError, match="not valid ONNX"):
        package.write(handmade("lstm").with_graph(break_it), figures, tmp_path / "m" / "1")
    assert _files(tmp_path) == set()


def test_description_that_contradicts_itself_is_not_written(
    handmade: Callable[[str], Any], figures: Any, tmp_path: Path
) -> None:
    model = handmade("lstm").model
    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(model.spec)
    spec.state_bytes += 1
    with pytest.raises(ExportError, match="contradicts itself: state_bytes"):
        package.write(replace(model, spec=spec), figures, tmp_path / "m" / "1")
    assert _files(tmp_path) == set()


@pytest.mark.parametrize("name", ["tagger", "0", "1.5", "v1", "²"])
def test_folder_that_is_no_version_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WriteRefused, match="neither a version folder nor"):
        package.target(tmp_path / name)


def test_place_that_cannot_be_written_is_refused(large: Any, figures: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(WriteRefused, match="cannot write"):
        package.write(large, figures, tmp_path / "taken" / "1")


def test_reading_what_is_no_model_says_so(handmade: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no model at"):
        package.read(tmp_path)
    (tmp_path / "text.onnx").write_text("this is not a model")
    with pytest.raises(ExportError, match="is not an ONNX model"):
        package.read(tmp_path / "text.onnx")
    onnx.save(handmade("gru").model.proto, tmp_path / "plain.onnx")
    with pytest.raises(ExportError, match="was not written by `conveyor export`"):
        package.read(tmp_path / "plain.onnx")
    proto = onnx.load(tmp_path / "plain.onnx")
    onnx.helper.set_model_props(proto, {METADATA_KEY: '{"spec_version": 99}'})
    onnx.save(proto, tmp_path / "newer.onnx")
    with pytest.raises(ExportError, match="spec_version 99"):
        package.read(tmp_path / "newer.onnx")


def test_strip_keeps_the_function(large: Any) -> None:
    stripped = onnx.ModelProto()
    stripped.CopyFrom(large.proto)
    strip(stripped)
    assert digest(stripped) == digest(large.proto)


def test_externalize_refuses_to_write_over_a_file(large: Any, tmp_path: Path) -> None:
    (tmp_path / "weights.data").write_bytes(b"someone's")
    with pytest.raises(FileExistsError):
        externalize(large.proto, tmp_path / "weights.data")
