"""`conveyor export` from a folder with a user's package in it: what it makes, and what it says when it refuses."""

import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conveyor_export import package
from conveyor_export.cli import _export_parser, export_command, inspect_command
from conveyor_proto.spec import initial_row
from torch import nn

USER_CODE = """
    import torch
    from torch import nn

    class Tagger(nn.Module):
        def __init__(self, kind="LSTM", **options):
            super().__init__()
            self.rnn = getattr(nn, kind)(3, 5, 2, batch_first=True, **options)
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    def gru():
        return Tagger("GRU")

    def rnn_tanh():
        return Tagger("RNN")

    def rnn_relu():
        return Tagger("RNN", nonlinearity="relu")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 5, batch_first=True, bidirectional=True)

        def forward(self, x):
            return self.rnn(x)[0]

    class Centred(Tagger):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(dim=1, keepdim=True)

    def broken():
        raise ValueError("no such layer")

    instance = Tagger()
    not_a_module = 7

    def example():
        return torch.randn(2, 6, 3)

    batch = torch.ones(1, 4, 3)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with `user_models.py` in it, and no trace of it afterwards."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    (tmp_path / "user_models.py").write_text(textwrap.dedent(USER_CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("user_models", None)


def _export(*arguments: str, model: str = "user_models:Tagger", out: str = "models/tagger/1") -> int:
    return export_command([model, "--example", "user_models:example", "--out", out, *arguments])


def _user_module(name: str) -> nn.Module:
    import user_models  # type: ignore[import-not-found]

    return getattr(user_models, name)()


def _step_through(file: Path, x: torch.Tensor) -> np.ndarray:
    """One time step per call from the initial state, as a server does it."""
    spec, _ = package.read(file)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    states = [np.stack([initial_row(state)] * len(x)) for state in spec.states]
    answers = []
    for time in range(x.shape[1]):
        feed = {state.input_name: value for state, value in zip(spec.states, states, strict=True)}
        feed |= {spec.inputs[0].name: x[:, time : time + 1].numpy(), spec.lengths_input: np.ones(len(x), np.int32)}
        answer, *states = session.run([spec.outputs[0].name, *(state.output_name for state in spec.states)], feed)
        answers.append(answer)
    return np.concatenate(answers, axis=1)


@pytest.mark.parametrize("factory", ["Tagger", "gru", "rnn_tanh", "rnn_relu"])
def test_trained_weights_answer_as_in_pytorch(
    factory: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    trained = _user_module(factory).eval()
    torch.save(trained.state_dict(), "state.pt")
    assert _export("--weights", "state.pt", model=f"user_models:{factory}") == 0
    captured = capsys.readouterr()
    assert "one-by-one" in captured.out
    assert "wrote models/tagger/1/model.onnx" in captured.out
    assert captured.err == ""
    file = folder / "models" / "tagger" / "1" / "model.onnx"
    spec, _ = package.read(file)
    assert spec.name == "tagger"
    assert len(spec.layers) == 2
    assert {case.mode for case in spec.verification.cases} == {"whole", "alone", "chunked", "one-by-one", "ragged"}
    x = torch.randn(3, 8, 3)
    with torch.no_grad():
        np.testing.assert_allclose(_step_through(file, x), trained(x).numpy(), rtol=0, atol=1e-5)
    assert inspect_command(["models/tagger"]) == 0
    assert "(the file matches)" in capsys.readouterr().out


def test_instances_values_and_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "user_models:instance",
        "--example",
        "user_models:batch",
        "--out",
        "m.onnx",
        "--name",
        "mine",
        "--quiet",
    ]
    assert export_command([*arguments, "--external-data", "--allow-non-finite-inputs", "--tolerance", "1e-4"]) == 0
    assert capsys.readouterr().out == ""
    spec, _ = package.read(folder / "m.onnx")
    assert spec.name == "mine"
    assert spec.allow_non_finite_inputs
    assert spec.verification.tolerance == 1e-4
    assert (folder / spec.external_data).is_file()


def test_checkpoint_entry_is_loaded_by_key(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    trained = _user_module("Tagger")
    torch.save({"epoch": 3, "model_state_dict": trained.state_dict()}, "checkpoint.pt")
    assert _export("--weights", "checkpoint.pt", "--weights-key", "model_state_dict", "--quiet") == 0


def test_pt2_file_is_exported_with_its_own_example(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    trained = _user_module("gru").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about torch's own recurrent modules
        torch.export.save(torch.export.export(trained, (torch.randn(2, 6, 3),)), "trained.pt2")
    assert export_command(["trained.pt2", "--out", "models/tagger/1", "--quiet"]) == 0
    file = folder / "models" / "tagger" / "1" / "model.onnx"
    x = torch.randn(2, 9, 3)
    with torch.no_grad():
        np.testing.assert_allclose(_step_through(file, x), trained(x).numpy(), rtol=0, atol=1e-5)
    assert [layer.path for layer in package.read(file)[0].layers] == ["rnn.0", "rnn.1"]


def test_model_that_is_there_is_refused_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _export("--quiet") == 0
    assert _export(model="user_models:nothing_of_this_name") == 2
    assert "is there already" in capsys.readouterr().err
    assert _export("--quiet", "--overwrite", model="user_models:gru") == 0
    assert "GRU" in package.read(folder / "models" / "tagger")[0].operations


REFUSED = {
    "no colon": (["user_models.Tagger"], "does not name the model: write MODULE:NAME"),
    "no module": (["no_such_package:Tagger"], "cannot import 'no_such_package' from"),
    "no attribute": (["user_models:Missing"], "user_models has no 'Missing'"),
    "factory raises": (["user_models:broken"], "user_models:broken() raised ValueError: no such layer"),
    "not a module": (["user_models:not_a_module"], "gave a int, not a torch.nn.Module"),
    "example missing": (["user_models:Tagger"], "an example is needed: --example MODULE:NAME"),
    "example unknown": (["user_models:Tagger", "--example", "user_models:none"], "user_models has no 'none'"),
    "weights missing": (
        ["user_models:Tagger", "--weights", "none.pt"],
        "cannot read the weights none.pt: No such file",
    ),
    "weights broken": (["user_models:Tagger", "--weights", "user_models.py"], "user_models.py"),
    "pt2 with weights": (["a.pt2", "--weights", "state.pt"], "brings its weights"),
    "pt2 missing": (["a.pt2"], "a.pt2 cannot be read as a torch.export file"),
    "bidirectional": (["user_models:Both", "--example", "user_models:example"], "bidirectional"),
    "no version": (["user_models:Tagger", "--out", "models/tagger"], "such as models/tagger/1"),
    "tolerance": (["user_models:Tagger", "--example", "user_models:example", "--tolerance", "-1"], "must be 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_is_one_message_and_status_2_and_writes_nothing(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = REFUSED[case]
    before = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    out = [] if "--out" in arguments else ["--out", "models/tagger/1"]
    assert export_command([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("conveyor export: ")
    assert message in error
    assert "Traceback" not in error
    assert {path for path in folder.rglob("*") if "__pycache__" not in path.parts} == before


def test_module_that_uses_the_whole_input_is_refused_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export(model="user_models:Centred") == 2
    assert "mean" in capsys.readouterr().err
    assert not (folder / "models").exists()


def test_debug_shows_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert _export("--debug", model="user_models:broken") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert 'raise ValueError("no such layer")' in error


def test_bug_of_ours_is_one_message_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bug(*_: object, **__: object) -> None:
        raise IndexError("off by one")

    monkeypatch.setattr("conveyor_export.export", bug)
    assert _export() == 2
    error = capsys.readouterr().err
    assert error.startswith("conveyor export: internal error, IndexError: off by one\n")
    assert "Traceback" not in error


def test_every_option_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    options = {option for action in _export_parser()._actions for option in action.option_strings if option[:2] == "--"}
    assert {option for option in options - {"--help"} if option not in text} == set()


def test_weights_that_do_not_fit_say_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(folder))
    state = _user_module("Tagger").state_dict()
    state["head.weight"] = torch.zeros(9, 5)
    state["tail.weight"] = state.pop("head.bias")
    torch.save(state, "state.pt")
    assert _export("--weights", "state.pt") == 2
    assert capsys.readouterr().err == textwrap.dedent("""\
        conveyor export: state.pt does not fit the module
          missing in the file: head.bias
          not in the module: tail.weight
          shapes: head.weight: [9, 5] in the file, [2, 5] in the module
        """)


def test_weights_of_a_wrapped_module_are_recognised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(folder))
    torch.save({f"module.{key}": value for key, value in _user_module("Tagger").state_dict().items()}, "state.pt")
    assert _export("--weights", "state.pt") == 2
    error = capsys.readouterr().err
    assert "every name begins with 'module.': save the state_dict of the wrapped module" in error
    assert "and 5 more" in error


def test_code_in_a_weights_file_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path("ran"),)

    torch.save({"weight": Payload()}, "state.pt")
    assert _export("--weights", "state.pt") == 2
    assert "code in a file is not run" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_checkpoint_without_its_key_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3, "model_state_dict": {}}, "checkpoint.pt")
    assert _export("--weights", "checkpoint.pt") == 2
    assert "it has entries epoch; model_state_dict. If one of them is the state_dict" in capsys.readouterr().err
    assert _export("--weights", "checkpoint.pt", "--weights-key", "ema") == 2
    assert "has no entry 'ema'" in capsys.readouterr().err


def test_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _export("--speed", "fast")
    assert stopped.value.code == 2
    assert "usage: conveyor export" in capsys.readouterr().err


def test_written_file_tells_no_paths(folder: Path) -> None:
    assert _export("--quiet") == 0
    content = (folder / "models" / "tagger" / "1" / "model.onnx").read_bytes()
    assert str(folder).encode() not in content
    assert b"site-packages" not in content
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
