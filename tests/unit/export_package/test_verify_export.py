"""The whole flow: a module is captured, verified and written, or refused with nothing written."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import conveyor_export
import numpy as np
import onnx
import pytest
import torch
from conveyor_export import ExportResult, VerificationFailed, WriteRefused, export, package
from conveyor_export.step_model import StepModel
from onnx import numpy_helper
from torch import nn

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


class Speller(nn.Module):
    """Tokens to logits and to a score of the last step, through two layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 4)
        self.rnn = KINDS[kind](4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, token: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.rnn(self.embed(token))[0])
        return {"logits": logits, "score": logits[:, -1].sum(dim=-1)}


@pytest.fixture(params=KINDS)
def speller(request: pytest.FixtureRequest) -> Speller:
    torch.set_num_threads(1)
    torch.manual_seed(2)
    return Speller(request.param)


EXAMPLE = torch.zeros(1, 5, dtype=torch.int64)


def _break(monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.ModelProto], None]) -> None:
    """Breaks what capture makes, as a bug in it would."""
    import conveyor_export.capture as captured

    original = captured.capture

    def broken(*args: Any, **options: Any) -> StepModel:
        model = original(*args, **options)
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        change(proto)
        return replace(model, proto=proto)

    monkeypatch.setattr(captured, "capture", broken)


def test_result_is_what_stands_in_the_file(
    speller: Speller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speller.train()
    before = {name: tensor.clone() for name, tensor in speller.state_dict().items()}
    result = export(speller, EXAMPLE, tmp_path / "speller" / "3")
    assert isinstance(result, ExportResult)
    assert result.path == tmp_path / "speller" / "3" / "model.onnx"
    assert package.read(result.path) == (result.spec, result.path)
    assert result.spec.verification == result.verification
    assert result.spec.name == "speller"
    assert [item.name for item in result.spec.outputs] == ["logits", "score"]
    assert [item.has_time for item in result.spec.outputs] == [True, False]
    assert max(case.max_abs_difference for case in result.verification.cases) <= 1e-5
    assert "one-by-one" in capsys.readouterr().out
    assert speller.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in speller.state_dict().items())


def test_quiet_names_and_verify_inputs(speller: Speller, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = export(
        speller,
        EXAMPLE,
        tmp_path / "m.onnx",
        name="mine",
        input_names=["character"],
        output_names=["next", "sum"],
        verify_inputs=[{"character": torch.full((2, 7), 16)}, {"character": np.full((1, 3), 9)}],
        quiet=True,
    )
    assert capsys.readouterr().out == ""
    assert result.spec.name == "mine"
    assert [item.name for item in result.spec.inputs] == ["character"]
    assert [item.name for item in result.spec.outputs] == ["next", "sum"]
    assert {case.inputs for case in result.verification.cases} == {"random", "example", "given"}


@pytest.mark.parametrize("layer", [0, 1])
def test_wrong_graph_names_output_and_first_layer_and_nothing_is_written(
    speller: Speller, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of one layer's gates in another order, or of a plain RNN's units: the layer above differs as well."""

    def permute(proto: onnx.ModelProto) -> None:
        recurrent = [node for node in proto.graph.node if node.op_type in {"LSTM", "GRU", "RNN"}]
        assert len(recurrent) == 2
        weight = next(item for item in proto.graph.initializer if item.name == recurrent[layer].input[1])
        gates = np.roll(numpy_helper.to_array(weight), 6 if recurrent[layer].op_type != "RNN" else 1, axis=1)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(gates), weight.name))

    _break(monkeypatch, permute)
    with pytest.raises(VerificationFailed) as failed:
        export(speller, EXAMPLE, tmp_path / "speller" / "1")
    message = str(failed.value)
    assert "mode 'whole'" in message
    assert "output 'logits' differs by" in message
    assert f"first that differs: layer 'rnn.{layer}', state 'rnn.{layer}.hidden'" in message
    assert list(tmp_path.iterdir()) == []


def test_tolerance_that_nothing_meets_writes_nothing(speller: Speller, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="as float32 rounding makes"):
        export(speller, EXAMPLE, tmp_path / "speller" / "1", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(conveyor_export.ExportError, match="must be 0 or more"):
        export(speller, EXAMPLE, tmp_path / "speller" / "1", tolerance=float("nan"))


def test_forward_that_draws_random_numbers_is_refused(speller: Speller, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = speller

        def forward(self, token: torch.Tensor) -> torch.Tensor:
            logits = self.inner(token)["logits"]
            return logits + torch.randn_like(logits)

    state = torch.random.get_rng_state()
    with pytest.raises(conveyor_export.ExportError, match="random"):
        export(Noisy(), EXAMPLE, tmp_path / "noisy" / "1")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_place_is_asked_before_the_work(speller: Speller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(speller, EXAMPLE, tmp_path / "1", quiet=True)
    _break(monkeypatch, lambda _: pytest.fail("captured although the place is taken"))
    with pytest.raises(WriteRefused, match="is there already"):
        export(speller, EXAMPLE, tmp_path / "1")


def test_importing_the_package_is_light() -> None:
    script = "import conveyor_export, sys; print(sorted({'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert all(hasattr(conveyor_export, name) for name in conveyor_export.__all__)
    assert issubclass(conveyor_export.CaptureError, conveyor_export.ExportError)
    from conveyor_export.capture import CaptureError

    assert CaptureError is conveyor_export.CaptureError
