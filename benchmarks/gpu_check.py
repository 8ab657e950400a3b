"""On a machine with CUDA: parity with PyTorch, batch independence, no state on the host, steps per second.

Invariant: exit status 0 says that all of it ran on CUDA and passed, 1 that something did not pass, 2 that CUDA is not
here and nothing was checked. The checks take any runner, so that their logic is tested without a GPU.
"""

import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conveyor_export import export
from conveyor_proto.codec import Array
from conveyor_proto.spec import state_row_bytes
from conveyor_server.runner.base import Run
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import DeviceUnavailable, Host, cuda_is_offered
from conveyor_server.runner.step_file import read_step_file
from numpy.typing import NDArray
from torch import nn

KINDS = ("rnn-tanh", "rnn-relu", "lstm", "gru")
INPUTS, HIDDEN, OUTPUTS = 8, 256, 8
BATCHES = (1, 16, 64, 256, 1024)
# float32 with TF32 off; cuDNN chooses its own order of summation, and another for another batch.
TOLERANCE = 5e-5
_SESSIONS, _TIME, _PROFILED_ROWS = 24, 40, 64
_NO_CUDA = 2
_ITEM_BYTES = {"float": 4, "double": 8, "float16": 2, "int64": 8, "int32": 4, "bool": 1, "uint8": 1, "int8": 1}

Open = Callable[[Path, int], OnnxRunner]


class Recurrent(nn.Module):
    """One layer of a kind and a linear head, state made inside forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers: dict[str, Callable[[], nn.RNNBase]] = {
            "rnn-tanh": lambda: nn.RNN(INPUTS, HIDDEN, batch_first=True),
            "rnn-relu": lambda: nn.RNN(INPUTS, HIDDEN, batch_first=True, nonlinearity="relu"),
            "lstm": lambda: nn.LSTM(INPUTS, HIDDEN, batch_first=True),
            "gru": lambda: nn.GRU(INPUTS, HIDDEN, batch_first=True),
        }
        self.layer = layers[kind]()
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, time, INPUTS]` to `[batch, time, OUTPUTS]`."""
        answer: torch.Tensor = self.head(self.layer(x)[0])
        return answer


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: the recurrent layer.
        what: what was checked.
        told: the figure, for a person.
        passed: whether it is as it must be; None: a figure without a bound.
    """

    kind: str
    what: str
    told: str
    passed: bool | None


def main() -> int:
    """Runs every check on CUDA and prints a table; returns the exit status."""
    missing = why_no_cuda()
    if missing:
        print(f"gpu-check: CUDA is not here, so nothing was checked: {missing}")
        return _NO_CUDA
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            findings += check(kind, Path(folder), _on_cuda)
    print(format_findings(findings))
    return int(any(finding.passed is False for finding in findings))


def why_no_cuda() -> str:
    """What this machine lacks, or nothing."""
    if not cuda_is_offered():
        return "this onnxruntime was built without it (install conveyor[server-gpu])"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (check nvidia-smi, and that torch was built with CUDA)"
    return ""


def check(kind: str, folder: Path, open_runner: Open) -> list[Finding]:
    """All findings on one kind of layer. A runner that will not open is a finding too."""
    torch.manual_seed(0)
    module = Recurrent(kind).eval()
    path = export(module, torch.randn(2, 6, INPUTS), folder / kind / "1", quiet=True).path
    try:
        runner = open_runner(path, 2 * max(BATCHES))
    except DeviceUnavailable as error:
        return [Finding(kind, "opens on the device", str(error), passed=False)]
    x = np.random.default_rng(0).standard_normal((_SESSIONS, _TIME, INPUTS)).astype(np.float32)
    together, alone = play(runner, x, company=True), play(runner, x, company=False)
    findings = [
        _within(kind, "parity with torch", together, whole_sequence(module, x)),
        _within(kind, "alone against company", together, alone),
        *state_stays(kind, runner),
        *(_speed(kind, module, runner, batch) for batch in BATCHES),
    ]
    runner.close()
    return findings


def whole_sequence(module: nn.Module, x: NDArray[np.float32]) -> Array:
    """What PyTorch says on the CPU of whole sequences `[sessions, time, INPUTS]`."""
    with torch.no_grad():
        answer: Array = module(torch.from_numpy(x)).numpy()
    return answer


def play(runner: OnnxRunner, x: NDArray[np.float32], *, company: bool) -> Array:
    """The answers `[sessions, time, OUTPUTS]` of sessions that step in chunks of their own lengths.

    With company, all that have something left share a batch; without, each runs alone. Chunks are the same.
    """
    rng = np.random.default_rng(1)
    sessions, time_steps = x.shape[:2]
    answers = np.zeros((sessions, time_steps, OUTPUTS), np.float32)
    done = np.zeros(sessions, np.int64)
    turn = 0
    while (done < time_steps).any():
        wanted = np.array(rng.integers(1, 6, (sessions,)))
        active = np.flatnonzero(done < time_steps)
        groups: list[NDArray[np.int64]] = [active] if company else np.split(active, len(active))
        for rows in groups:
            lengths = np.minimum(wanted[rows], time_steps - done[rows]).astype(np.int32)
            chunk = np.zeros((len(rows), lengths.max(), x.shape[2]), np.float32)
            for row, session in enumerate(rows):
                chunk[row, : lengths[row]] = x[session, done[session] : done[session] + lengths[row]]
            # A session has two slots and uses them in turn.
            sources, destinations = 2 * rows + turn, 2 * rows + 1 - turn
            result = runner.step(Run(sources, destinations, done[rows] == 0, lengths, [chunk]))
            for row, session in enumerate(rows):
                answers[session, done[session] : done[session] + lengths[row]] = result.outputs[0][row, : lengths[row]]
            done[rows] += lengths
        turn = 1 - turn
    return answers


def state_stays(kind: str, runner: OnnxRunner) -> list[Finding]:
    """Where the slabs lie, and how much a profiled run copies between device and host inside the graph."""
    devices = runner.slab_devices
    one_state_bytes = _PROFILED_ROWS * min(state_row_bytes(state) for state in runner.spec.states)
    for _ in range(3):
        runner.step(_one_step(_PROFILED_ROWS))
    copied_bytes = most_copied_bytes(json.loads(runner.end_profiling().read_text()))
    return [
        Finding(kind, "slabs lie on", ", ".join(devices), passed=set(devices) == {runner.device}),
        Finding(
            kind,
            "copied between host and device",
            f"at most {copied_bytes} bytes a node; one state of the batch has {one_state_bytes}",
            passed=copied_bytes < one_state_bytes,
        ),
    ]


def most_copied_bytes(events: Iterable[dict[str, Any]]) -> int:
    """The largest tensor that a Memcpy node of an onnxruntime profile moved, in bytes; 0 where none did."""
    return max((_bytes(event["args"]) for event in events if _is_copy(event)), default=0)


def _is_copy(event: dict[str, Any]) -> bool:
    args = event.get("args") or {}
    return str(args.get("op_name", "")).startswith("Memcpy") and "output_type_shape" in args


def _bytes(args: dict[str, Any]) -> int:
    return sum(
        _ITEM_BYTES[dtype] * math.prod(shape) for tensor in args["output_type_shape"] for dtype, shape in tensor.items()
    )


def _speed(kind: str, module: Recurrent, runner: OnnxRunner, batch: int) -> Finding:
    """Steps per second against torch on the same device, host memory in and out on both sides."""
    runner.step(_one_step(batch))
    run = _one_step(batch, fresh=False)
    ours = steps_per_second(lambda: runner.step(run))
    device = torch.device(runner.device)
    there, x = copy.deepcopy(module).to(device), torch.from_numpy(np.array(run.inputs[0]))
    state: list[Any] = [None]

    def theirs() -> None:
        y, state[0] = there.layer(x.to(device), state[0])
        there.head(y).cpu()

    with torch.no_grad():
        torch_steps = steps_per_second(theirs)
    told = f"{ours:,.0f} steps/s, torch {torch_steps:,.0f} ({ours / torch_steps:.2f}x); {ours * batch:,.0f} tokens/s"
    return Finding(kind, f"speed, batch {batch}", told, passed=None)


def steps_per_second(step: Callable[[], object], seconds: float = 0.3) -> float:
    """Calls per second, after ten that warm; a call must not return before its result is on the host."""
    for _ in range(10):
        step()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - began)


def _one_step(batch: int, *, fresh: bool = True) -> Run:
    """One time step for each row; a fresh run leaves its state where one that is not fresh reads it."""
    slots = np.arange(batch, dtype=np.int64)
    x = np.random.default_rng(batch).standard_normal((batch, 1, INPUTS)).astype(np.float32)
    return Run(
        sources=slots,
        destinations=slots if fresh else slots + batch,
        fresh=np.full(batch, fresh),
        lengths=np.ones(batch, np.int32),
        inputs=[x],
    )


def _within(kind: str, what: str, found: Array, expected: Array) -> Finding:
    worst = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    return Finding(kind, what, f"{worst:.2e} (at most {TOLERANCE:.0e})", passed=worst <= TOLERANCE)


def _on_cuda(path: Path, capacity: int) -> OnnxRunner:
    return OnnxRunner(
        read_step_file(path), Host("cuda", 1, shares_memory=False, profile=str(path.parent / "p")), capacity
    )


def format_findings(findings: Sequence[Finding]) -> str:
    """The report as a table."""
    marks = {True: "ok", False: "FAILED", None: ""}
    rows = [("layer", "check", "", "figure"), *((f.kind, f.what, marks[f.passed], f.told) for f in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
