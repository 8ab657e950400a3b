"""open_runner: devices, threads, external weights, and what it says when it cannot."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conveyor_server.runner import graph, provider
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.onnx_runner import open_runner
from conveyor_server.runner.provider import DeviceUnavailable, Host, open_session, recurrent_elsewhere

Make = Callable[..., Any]


def test_cpu(recurrent: Make, save: Make, one_run: Make) -> None:
    runner = open_runner(save(recurrent("lstm")), device="cpu", threads=2, capacity=5)
    assert (runner.device, runner.capacity, runner.spec.name) == ("cpu", 5, "hand-made")
    result = runner.step(one_run([np.ones((5, 1, 5), np.float32)], [0, 1, 2, 3, 4]))
    assert result.outputs[0].shape == (5, 1, 3)
    runner.close()


def test_telemetry_is_off() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(("threads", "capacity"), [(0, 1), (1, 0)])
def test_sizes_below_one(threads: int, capacity: int, recurrent: Make, save: Make) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        open_runner(save(recurrent("gru")), device="cpu", threads=threads, capacity=capacity)


def test_cuda_is_refused_where_onnxruntime_has_none(
    recurrent: Make, save: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match=r"install conveyor\[server-gpu\].* or use --device cpu"):
        open_runner(save(recurrent("lstm")), device="cuda", threads=1, capacity=4)


class _FellBack:
    """A session as onnxruntime returns it when CUDA is built in and no GPU answers."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def disable_fallback(self) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_cuda_is_refused_where_onnxruntime_falls_back(
    recurrent: Make, save: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", _FellBack)
    with pytest.raises(DeviceUnavailable, match="fell back to the CPU: check `nvidia-smi`"):
        open_runner(save(recurrent("lstm")), device="cuda", threads=1, capacity=4)


@pytest.mark.parametrize("offered", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_auto_takes_the_cpu_and_says_why(
    offered: list[str], recurrent: Make, save: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: offered)
    monkeypatch.setattr(provider, "_require_cuda", lambda: None)
    with caplog.at_level(logging.INFO, logger="conveyor_server.runner"), pytest.MonkeyPatch.context() as patch:
        if len(offered) == 2:
            real = ort.InferenceSession
            patch.setattr(
                ort,
                "InferenceSession",
                lambda *a, providers, **k: _FellBack() if len(providers) > 1 else real(*a, providers=providers, **k),
            )
        runner = open_runner(save(recurrent("gru")), device="auto", threads=1, capacity=4)
    assert runner.device == "cpu"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("device auto: cpu, because ")
    runner.close()


def test_auto_does_not_hide_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(RunnerUnavailable, match="is not there"):
        open_runner(tmp_path / "model.onnx", device="auto", threads=1, capacity=4)


def test_recurrent_operators_elsewhere_are_found(recurrent: Make) -> None:
    """The CPU session stands in for one where CUDA left a layer on the CPU."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(recurrent("gru").SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert {name.split()[0] for name in recurrent_elsewhere(session, "CUDAExecutionProvider")} == {"GRU"}
    assert recurrent_elsewhere(session, "CPUExecutionProvider") == set()


def test_an_onnxruntime_that_cannot_tell_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert recurrent_elsewhere(_FellBack(), "CUDAExecutionProvider") == set()
    assert "too old to tell" in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: setattr(p, "ir_version", 99), r"\(IR 99, opset ai.onnx 20\).*IR version"),
        (lambda p: setattr(p.opset_import[0], "version", 99), r"\(IR 10, opset ai.onnx 99\).*pset"),
        (lambda p: setattr(p.graph.node[-1], "domain", "my.operators"), r"does not load model.onnx.*my.operators"),
    ],
)
def test_what_onnxruntime_does_not_load(
    change: Callable[[onnx.ModelProto], None], told: str, recurrent: Make, save: Make
) -> None:
    proto = recurrent("lstm")
    change(proto)
    with pytest.raises(RunnerUnavailable, match=told):
        open_runner(save(proto), device="cpu", threads=1, capacity=4)


def test_external_weights_of_the_model_s_own_folder(
    recurrent: Make, tmp_path: Path, one_run: Make, load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = recurrent("lstm", hidden=64)
    x = [np.ones((1, 2, 5), np.float32)]
    expected = load(proto).step(one_run(x, [0])).outputs[0]
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024)
    assert (folder / "weights.bin").stat().st_size > (folder / "model.onnx").stat().st_size
    monkeypatch.chdir(tmp_path)
    runner = open_runner(Path("external/model.onnx"), device="cpu", threads=1, capacity=4)
    np.testing.assert_array_equal(runner.step(one_run(x, [0])).outputs[0], expected)
    runner.close()


def test_a_session_does_not_spin(recurrent: Make) -> None:
    session = open_session(recurrent("lstm"), Host.of("cpu", 2))
    options = session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_which_models_run_in_company(recurrent: Make, maker: Make) -> None:
    assert not graph.needs_company(recurrent("lstm"))
    assert not graph.needs_company(recurrent("gru", head="Gemm"))
    assert graph.needs_company(recurrent("rnn-relu"))
    folded = maker()
    transposed = folded.node("Transpose", [folded.weight(folded.random(3, 5))], "transposed")
    folded.node("MatMul", [folded.input("x", [5]), transposed], folded.output("y", [3]))
    assert not graph.needs_company(folded.proto())
    stacked = maker()
    stacked.node("MatMul", [stacked.input("x", [5]), stacked.weight(stacked.random(1, 5, 3))], stacked.output("y", [3]))
    assert graph.needs_company(stacked.proto())
    other = maker()
    other.node("FusedMatMul", [other.input("x", [5]), "x"], other.output("y", [5]), domain="com.microsoft")
    assert graph.needs_company(other.proto())


def test_a_model_whose_last_bit_depends_on_its_company_is_named(
    maker: Make, load: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = maker()
    model.node("Softplus", [model.node("Log", [model.input("x", [3])], "log")], model.output("y", [3]))
    load(model.proto())
    assert [record.getMessage() for record in caplog.records] == [
        "hand-made: Log, Softplus may change the last bit of a row with its company"
    ]
