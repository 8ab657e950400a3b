"""`conveyor adopt`, as it is typed: what is written, what is printed, and what is asked or refused."""

import errno
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conveyor_server.adopt.command import command
from conveyor_server.adopt.render import render
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import (
    Constant,
    Description,
    Input,
    Output,
    Start,
    State,
    Window,
    parse_description,
)
from conveyor_server.runner.step_file import read_step_file
from foreign import cell, lstm


def typed(*arguments: str | Path) -> int:
    return command([str(argument) for argument in arguments])


def test_a_model_is_written_and_is_what_a_server_reads(tmp_path: Path, capsys) -> None:
    file, models = lstm().save(tmp_path / "words.onnx"), tmp_path / "models"
    assert typed(file, "--models", models, "--time-axis", "x=1") == 0
    printed = capsys.readouterr().out
    text = (models / "words" / "model.yaml").read_text()
    assert printed.startswith(text)
    assert f"serve it with `conveyor serve --models {models}`" in printed
    assert re.sub(r"(?m)^#.*\n", "", text) == (
        "conveyor: 1\n"
        "batch: dynamic\n"
        "inputs:\n"
        "  x: {batch_axis: 0, time_axis: 1, shape: [4]}\n"
        "outputs:\n"
        '  "y": {batch_axis: 0, time_axis: 1, shape: [8]}\n'
        "states:\n"
        "  - {name: h, input: h, output: hn, batch_axis: 1, shape: [1, 8], initial: 0}  # the hidden state of n1\n"
        "  - {name: c, input: c, output: cn, batch_axis: 1, shape: [1, 8], initial: 0}  # the cell state of n1\n"
    )
    assert "# Proved: 16 sessions, 160 time steps in batches of 1, 2, 3, 5, 8, 16, and each alone" in text
    assert "the same bits." in text
    spec = read_step_file(models / "words" / "1" / "model.onnx").spec
    assert (spec.name, [state.name for state in spec.states]) == ("words", ["h", "c"])
    assert not list(models.rglob("*.part"))


def test_questions_are_asked_together_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    file, models = cell(["p", "q"], ["r", "s"]).save(tmp_path / "file.onnx"), tmp_path / "models"
    assert typed(file, "--models", models) == 2
    told = capsys.readouterr().err
    assert told.startswith("conveyor adopt: nothing is guessed, so 3 questions first:\n  1. is input x float32 [N, 1]")
    assert "Say --state p=r or --state p=s; or --input p if clients send it" in told
    assert not models.exists()
    answers = ("--input", "x", "--state", "p=s", "--state", "q=r", "--initial", "q=[1, 2, 3]", "--output", "y")
    assert typed(file, "--models", models, *answers) == 0
    states = parse_description((models / "file" / "model.yaml").read_bytes()).states
    assert states == (State("p", "p", "s", 0, (3,), 0), State("q", "q", "r", 0, (3,), [1, 2, 3]))


def test_print_writes_nothing(tmp_path: Path, capsys) -> None:
    file = lstm(rows=1, time=1).save(tmp_path / "file.onnx")
    assert typed(file, "--models", tmp_path / "models", "--print", "--input", "x") == 0
    printed = capsys.readouterr().out
    assert "# Row by row: the file fixes x float32 [1, 1, 4], h float32 [1, 1, 8], c float32 [1, 1, 8].\n" in printed
    assert parse_description(printed.encode()).batch == "one"
    assert not (tmp_path / "models").exists()


def test_weights_beside_the_file_come_with_it(tmp_path: Path) -> None:
    file, models = tmp_path / "file.onnx", tmp_path / "models"
    onnx.save(lstm().proto(), file, save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert typed(file, "--models", models, "--name", "big", "--version", "3", "--time-axis", "x=1") == 0
    assert (models / "big" / "3" / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    assert read_step_file(models / "big" / "3" / "model.onnx").spec.states[0].name == "h"


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path, capsys) -> None:
    models = tmp_path / "models"
    small, large = lstm().save(tmp_path / "small.onnx"), lstm(hidden=16).save(tmp_path / "large.onnx")
    flags = ("--models", models, "--name", "m", "--time-axis", "x=1")
    assert typed(small, *flags) == 0
    assert typed(small, *flags) == 2
    assert "is there already: choose another --version or --name, or say --overwrite" in capsys.readouterr().err
    assert typed(small, *flags, "--version", "2") == 0, "the same description holds for both"
    assert typed(large, *flags, "--version", "3") == 2
    assert "says otherwise, and it holds for all versions" in capsys.readouterr().err
    assert not (models / "m" / "3" / "model.onnx").exists()
    assert typed(large, *flags, "--version", "3", "--overwrite") == 0
    assert read_step_file(models / "m" / "3" / "model.onnx").spec.states[0].shape == [1, 16]


def test_a_file_that_is_in_its_place_is_described_there(tmp_path: Path, capsys, monkeypatch) -> None:
    """As the server's refusal says to do it."""
    monkeypatch.chdir(tmp_path)
    file = cell(["a"], ["b"]).save(Path("m/2/model.onnx"))
    with pytest.raises(RunnerUnavailable) as refused:
        read_step_file(file)
    (line,) = re.findall(r"`conveyor (adopt .*?)`, from the folder of the models", str(refused.value))
    before = file.stat()
    assert typed(*line.split()[1:], "--input", "x", "--state", "a=b") == 0
    assert capsys.readouterr().out.endswith("m/2/model.onnx: serve it with `conveyor serve --models .`\n")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [state.name for state in read_step_file(file).spec.states] == ["a"]
    assert typed(file, "--input", "x", "--state", "a=b", "--initial", "a=1") == 2
    assert "m/model.yaml is there already and says otherwise" in capsys.readouterr().err
    assert typed(file, "--input", "x", "--state", "a=b", "--initial", "a=1", "--overwrite") == 0
    Path("m/model.yaml").write_text("conveyor: 99")
    assert typed(file, "--input", "x", "--state", "a=b") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "which file? Say FILE.onnx, or --triton DIR"),
        (["none.onnx"], "none.onnx is not there"),
        (["file.onnx", "--name", "a/b"], "'a/b' is no name for a model"),
        (["file.onnx", "--version", "one"], "'one' is no version: a whole number such as 1"),
        (["file.onnx", "--triton", "folder"], "name two models"),
        (["file.onnx", "--state", "h"], "'h' is not NAME=VALUE"),
        (["file.onnx", "--batch-axis", "x=first"], "'first' is no axis: 0 is the first"),
        (["file.onnx", "--shape", "x=4,0"], "'4,0' is no list of sizes such as 45,80"),
        (["file.onnx", "--window", "x=@1"], "'@1' is not SIZE or SIZE@AXIS"),
        (["file.onnx", "--constant", "x=fast"], "'fast' is no number and no list of numbers"),
        (["file.onnx", "--initial", "x=[1, two]"], "'[1, two]' is no number and no list"),
        (["file.onnx", "--tolerance", "-1"], "-1 is not a number of 0 or more"),
    ],
)
def test_what_cannot_be_understood(arguments, told, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lstm().save(tmp_path / "file.onnx")
    try:
        code = command(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert told in capsys.readouterr().err


def test_a_window_a_constant_and_a_batch_axis_of_one(tmp_path: Path) -> None:
    graph = cell(["state"], ["stateN"])
    graph.input("audio", np.float32, [None, None])
    graph.input("lens", np.int64, ["N"])
    graph.node("Identity", ["audio"], "echo")
    graph.output("echo", np.float32, ["N", "M"])
    flags = ["--window", "audio=4", "--shape", "audio=6", "--batch-axis", "audio=0", "--input", "x"]
    flags += ["--constant", "lens=6", "--batch-axis", "lens=0"]
    assert typed(graph.save(tmp_path / "file.onnx"), "--models", tmp_path, "--name", "m", *flags) == 0
    described = parse_description((tmp_path / "m" / "model.yaml").read_bytes())
    assert described.inputs[1] == Input("audio", 0, None, (6,), Window(4, 1))
    assert described.outputs[1] == Output("echo", 0, None, (10,))
    assert described.constants == (Constant("lens", 6, 0),)


def test_names_and_numbers_that_yaml_reads_otherwise() -> None:
    """`render` checks that what it writes reads back; here it has every reason to fail."""
    names = ["on", "12", "0x1", "a b", "a: b", "#", "'", '"', "é", "null", "-", "~", "x.y/z:0", "\t", "1.5", "no"]
    names += ["\n", "\u2028x", "\x85", "\\", "\U0001f600", "\x00", "\ufeff"]
    numbers = [0, -3, 0.1, 1e-7, 1e22, 1.5e-300, -0.0, True, [[1, 2.5], [3, 1e16]]]
    described = Description(
        inputs=tuple(Input(name, 0) for name in names),
        outputs=tuple(Output(name, 0, 1, ()) for name in names),
        states=tuple(State(f"s{index}", f"in {index}", f"out:{index}", 1, (2,), n) for index, n in enumerate(numbers)),
        constants=(Constant("c on", 1e-7), Constant("rows", [1.0], 0)),
        starts=(Start("yes", 1.0, 0.0, 0),),
        batch="dynamic",
        allow_non_finite_inputs=True,
    )
    text = render(described, ["a comment", "of\nconstants: {x: 1}"], {"in 0": "by\u2028constants: {y: 1}"})
    assert parse_description(text.encode()) == described


@pytest.mark.parametrize("fails", ["model.onnx.part", "model.yaml.part"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, capsys, monkeypatch, fails) -> None:
    first, second, models = (
        lstm().save(tmp_path / "a.onnx"),
        cell(["p"], ["p2"]).save(tmp_path / "b.onnx"),
        tmp_path / "m",
    )
    assert typed(first, "--models", models, "--name", "words", "--time-axis", "x=1") == 0
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}

    def full(method):
        def write(target, *arguments):
            if Path(target).name == fails:
                Path(target).write_bytes(b"a part of it")
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            return method(target, *arguments)

        return write

    copied = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: full(lambda to: copied(source, to))(target))
    monkeypatch.setattr(Path, "write_text", full(Path.write_text))
    capsys.readouterr()
    answers = ("--input", "x", "--state", "p=p2", "--overwrite")
    assert typed(second, "--models", models, "--name", "words", *answers) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before
