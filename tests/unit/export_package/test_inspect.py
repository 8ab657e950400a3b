"""`conveyor inspect` shows what the file says, checks its digest, and needs no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conveyor_export import package
from conveyor_export.cli import inspect_command
from conveyor_export.inspect_model import human_bytes
from conveyor_export.verify import verify
from conveyor_proto.spec import parse_spec
from conveyor_proto.v1 import spec_pb2
from onnx import numpy_helper


@pytest.fixture
def written(any_kind: Any, tmp_path: Path) -> Path:
    return package.write(any_kind.model, verify(any_kind.model), tmp_path / "tagger" / "1")


def _sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for block in text.strip().split("\n\n"):
        title, *lines = block.splitlines()
        found[title.split(",")[0]] = [line.strip() for line in lines]
    return found


def test_every_section_says_what_the_spec_says(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, _ = package.read(written)
    assert inspect_command([str(written.parent)]) == 0
    text = capsys.readouterr().out
    sections = _sections(text)
    assert text.startswith(f"tagger  {written}\n")
    assert [line.split() for line in sections["inputs"]] == [["x", "float32", "[time,", "3]"]]
    assert [line.split() for line in sections["outputs"]] == [["logits", "float32", "[time,", "2]"]]
    assert [line.split()[0] for line in sections["states"]] == [state.name for state in spec.states]
    assert f"states, {20 * len(spec.states)} B per session" in text
    kind = spec_pb2.LayerKind.Name(spec.layers[0].kind).removeprefix("LAYER_KIND_")
    shown = {"RNN_TANH": "RNN (tanh)", "RNN_RELU": "RNN (relu)"}.get(kind, kind)
    assert shown in sections["layers"][0]
    assert "3 -> 5" in sections["layers"][0]
    assert "Transpose x 2" in sections["operations"][0]
    assert any(line.startswith("lengths  'lengths'") for line in sections["file"])
    assert f"digest   {spec.digest} (the file matches)" in sections["file"]
    assert "tolerance 1e-05" in sections["verified"][0]
    assert sections["verified"][1].split() == ["inputs", "tensor", "whole", "alone", "chunked", "one-by-one", "ragged"]
    assert len(sections["verified"]) == 2 + 2 * (1 + len(spec.states))


def test_columns_line_up(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command([str(written)])
    table = capsys.readouterr().out.split("tolerance")[1].splitlines()[1:]
    assert len({len(line) for line in table}) == 1


def test_json_is_the_spec(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command([str(written), "--json"]) == 0
    text = capsys.readouterr().out
    json.loads(text)
    assert parse_spec(text) == package.read(written)[0]


def test_altered_weight_is_noticed(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = onnx.load(written)
    weight = proto.graph.initializer[0]
    array = numpy_helper.to_array(weight).copy()
    array.reshape(-1)[0] += np.float32(1)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, written)
    assert inspect_command([str(written)]) == 0
    assert "DOES NOT MATCH" in capsys.readouterr().out


def test_weights_beside_the_model_are_shown_and_missed(
    handmade: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = handmade("lstm").model
    model.proto.graph.initializer.append(numpy_helper.from_array(np.ones(1000, np.float32), "big"))
    model.proto.graph.node.append(onnx.helper.make_node("Identity", ["big"], ["big_again"]))
    file = package.write(model, verify(model), tmp_path / "1", external_data=True)
    weights = file.with_name(package.read(file)[0].external_data)
    inspect_command([str(file)])
    text = capsys.readouterr().out
    assert f"{weights.name}, 4000 B (3.9 KiB)" in text
    assert "(the file matches)" in text
    weights.unlink()
    assert inspect_command([str(file)]) == 0
    text = capsys.readouterr().out
    assert f"{weights.name} is MISSING" in text
    assert "cannot be checked" in text


def test_learned_initial_state_is_shown(
    handmade: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = handmade("lstm").model
    model.spec.states[1].initial = np.ones(5, np.float32).tobytes()
    package.write(model, spec_pb2.Verification(), tmp_path / "1")
    inspect_command([str(tmp_path / "1")])
    states = _sections(capsys.readouterr().out)["states"]
    assert [line.split()[-1] for line in states] == ["zeros", "learned"]


def test_what_is_no_model_is_one_message_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"conveyor inspect: no model at {tmp_path}")
    assert "Traceback" not in captured.err
    assert inspect_command([str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect_imports_neither_torch_nor_onnxruntime(written: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "from conveyor_export.cli import inspect_command\n"
        f"sys.exit(inspect_command([{str(written)!r}]))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "the file matches" in ran.stdout


def test_reader_that_leaves_early_is_no_error(written: Path) -> None:
    script = f"import sys; from conveyor_export.cli import inspect_command as i; sys.exit(i([{str(written)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1024 B (1.0 KiB)"), (5 << 30, "5368709120 B (5.0 GiB)")]
)
def test_sizes_are_exact_and_readable(size: int, text: str) -> None:
    assert human_bytes(size) == text
