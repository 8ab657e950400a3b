"""A client of another language against the real server: grpc-js, from our own .proto files and nothing else of ours."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from by_hand import ByHand
from node_packages import installed, node
from triton_user import Script, scripts

from tests.e2e.conftest import FEATURES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "js"
SEQUENCES = 32


@pytest.fixture
def include_dir(tmp_path: Path) -> Path:
    """Our .proto files, laid out as they import each other."""
    folder = tmp_path / "include"
    shutil.copytree(ROOT / "proto" / "inference", folder / "conveyor_proto" / "inference")
    return folder


@pytest.fixture
def drive(include_dir: Path) -> Callable[[str, str, list[dict]], list[list[dict]]]:
    """Runs the program, and returns what it was answered."""

    def run(target: str, model: str, sequences: list[dict]) -> list[list[dict]]:
        done = subprocess.run(
            [node(), str(PROGRAM / "sequences.js"), str(include_dir), target, model],
            env={**os.environ, "NODE_PATH": str(installed(PROGRAM / "package.json") / "node_modules")},
            input=json.dumps(sequences),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def described(script: Script, typed: bool) -> dict:
    return {"id": script.id, "typed": typed, "steps": [step.tolist() for step in script.steps]}


@pytest.mark.parametrize("model", ["lstm", "gru", "rnn"])
def test_interleaved_sequences_typed_and_raw(start_server, transport, nets, drive, model):
    server = start_server()
    everyone = scripts([number if number % 3 else f"js-{number}" for number in range(1, SEQUENCES + 1)], FEATURES, 7)
    assert len({len(script.steps) for script in everyone}) > 3
    answers = drive(server.target, model, [described(script, typed=bool(n % 2)) for n, script in enumerate(everyone)])

    hand = ByHand(nets.folder / model / "1" / "model.onnx")
    assert len(answers) == SEQUENCES
    for script, told in zip(everyone, answers, strict=True):
        for step, answer, want in zip(script.steps, told, hand.run(script.steps), strict=True):
            assert (answer["name"], answer["datatype"], answer["final"]) == ("output", "FP32", True)
            assert answer["shape"] == [len(step), 3]
            got = np.array(answer["values"], np.float32).reshape(want.shape)
            np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)


def test_what_it_is_refused_reaches_the_program(start_server, drive):
    server = start_server()
    (script,) = scripts([1], FEATURES, 8)
    with pytest.raises(AssertionError, match="Request for unknown model: 'nope' is not found"):
        drive(server.target, "nope", [described(script, typed=True)])
