"""The logic of `make gpu-check` on the CPU: a device's code with the CPU as the device."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conveyor_server.runner.base import Run, RunResult
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import DeviceUnavailable, Host
from conveyor_server.runner.step_file import read_step_file

from benchmarks import gpu_check

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu_check, "BATCHES", (1, 4))
    monkeypatch.setattr(gpu_check, "_PROFILED_ROWS", 4)
    monkeypatch.setattr(gpu_check, "_SESSIONS", 3)
    monkeypatch.setattr(gpu_check, "_TIME", 9)
    monkeypatch.setattr(gpu_check, "HIDDEN", 16)


def _as_a_device(path: Path, capacity: int) -> OnnxRunner:
    return OnnxRunner(read_step_file(path), Host("cpu", 1, False, str(path.parent / "p")), capacity)


@pytest.mark.parametrize("kind", gpu_check.KINDS)
def test_every_check_passes_where_the_cpu_is_the_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = gpu_check.steps_per_second
    monkeypatch.setattr(gpu_check, "steps_per_second", lambda step: once(step, seconds=0.01))
    findings = gpu_check.check(kind, tmp_path, _as_a_device)
    assert {finding.what: finding.passed for finding in findings} == {
        "parity with torch": True,
        "alone against company": True,
        "slabs lie on": True,
        "copied between host and device": True,
        "speed, batch 1": None,
        "speed, batch 4": None,
    }
    table = gpu_check.format_findings(findings)
    assert table.count("\n") == len(findings)
    assert "at most 0 bytes a node" in table


class _Forgetful:
    """A runner that starts every row afresh: what a check must catch."""

    def __init__(self, runner: OnnxRunner) -> None:
        self._runner = runner

    def step(self, run: Run) -> RunResult:
        rows = len(run.lengths)
        return self._runner.step(Run(run.sources, run.destinations, np.ones(rows, bool), run.lengths, run.inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def test_a_runner_that_forgets_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "steps_per_second", lambda step: 1.0)
    findings = gpu_check.check("gru", tmp_path, lambda path, rows: _Forgetful(_as_a_device(path, rows)))  # type: ignore[arg-type,return-value]
    assert [finding.what for finding in findings if finding.passed is False] == ["parity with torch"]
    assert "FAILED" in gpu_check.format_findings(findings)


def test_a_runner_that_does_not_open_is_a_finding(tmp_path: Path) -> None:
    def refuse(path: Path, capacity: int) -> OnnxRunner:
        raise DeviceUnavailable("no such device")

    (finding,) = gpu_check.check("lstm", tmp_path, refuse)
    assert (finding.passed, finding.told) == (False, "no such device")


def test_copies_are_found_in_a_profile() -> None:
    """As onnxruntime writes them: a state of 64 rows goes to the host, an index comes from it."""
    events = [
        {"cat": "Session", "name": "model_run"},
        {"name": "lstm", "args": {"op_name": "LSTM", "output_type_shape": [{"float": [1, 1, 64, 256]}]}},
        {"name": "Memcpy_fence_before", "args": {"op_name": "MemcpyToHost"}},
        {"name": "Memcpy", "args": {"op_name": "MemcpyFromHost", "output_type_shape": [{"int64": [64]}]}},
    ]
    assert gpu_check.most_copied_bytes(events) == 512
    state = {"name": "Memcpy_1", "args": {"op_name": "MemcpyToHost", "output_type_shape": [{"float": [64, 256]}]}}
    assert gpu_check.most_copied_bytes([*events, state]) == 64 * 256 * 4
    assert gpu_check.most_copied_bytes([]) == 0


def test_without_cuda_it_says_so_and_exits_with_2() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers() and torch.cuda.is_available():
        assert gpu_check.why_no_cuda() == ""
        return
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: CUDA is not here, so nothing was checked: ")
