"""onnxruntime sessions on the device that was asked for, or not at all.

Invariant: a session that is returned runs where its `device` says; there is no silent fallback from CUDA to the CPU.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime as ort

from conveyor_server.runner.base import RunnerUnavailable

Device = Literal["cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# TF32 keeps ten bits of a product's mantissa: parity with the CPU and with PyTorch would be 1e-3, not 1e-5.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_FATAL_ONLY = 4
_log = logging.getLogger(__name__)


class DeviceUnavailable(RunnerUnavailable):
    """The device is not there, or would not run the model. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where and how sessions run.

    Attributes:
        device: `cpu` or `cuda`.
        threads: threads of one operator on the CPU, at least 1.
        shares_memory: numpy and onnxruntime see the same bytes. False works on the CPU too, in the way of a device:
            that is how tests reach the code that a GPU runs.
        profile: what the name of the file begins with that onnxruntime writes its runs to; empty: it writes none.
    """

    device: Device
    threads: int
    shares_memory: bool
    profile: str = ""

    @classmethod
    def of(cls, device: Device, threads: int) -> "Host":
        """The host as it is served: CUDA shares no memory with numpy, the CPU does."""
        return cls(device, threads, device == "cpu")


def open_session(model: onnx.ModelProto, host: Host, *, folder: Path | None = None, name: str = "the model") -> Any:
    """An onnxruntime InferenceSession of a graph. Any thread; blocks for as long as optimising takes.

    Args:
        model: the graph.
        host: where it is to run.
        folder: folder that external weights lie in, checked to be the model's own; None: all weights are inline.
        name: what messages call the graph.

    Raises:
        DeviceUnavailable: CUDA is not really there, or recurrent operators would run on the CPU.
        RunnerUnavailable: onnxruntime does not load the graph.
    """
    options = _options(host, folder)
    providers: list[Any] = [_CPU]
    if host.device == "cuda":
        _require_cuda()
        providers.insert(0, (_CUDA, _CUDA_OPTIONS))
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise RunnerUnavailable(_why_not(model, name, folder, error)) from error
    session.disable_fallback()
    if host.device == "cuda":
        _check_cuda(session)
    return session


def cuda_is_offered() -> bool:
    """True where this onnxruntime was built with CUDA; whether a GPU answers is another question."""
    return _CUDA in ort.get_available_providers()


def why_no_cuda() -> str:
    """Why a graph that CUDA can run does not open on it; empty: it does. Some seconds where there is a GPU."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "probe", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    try:
        open_session(model, Host.of("cuda", 1), name="a probe")
    except RunnerUnavailable as error:
        return str(error)
    return ""


def _options(host: Host, folder: Path | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = host.threads
    options.inter_op_num_threads = 1
    # Of the session, not of each run: options of a run cost it 40 microseconds. What fails is raised all the same, and
    # onnxruntime's own words quote the input.
    options.log_severity_level = _FATAL_ONLY
    # A pool of one has no one to wait for; a larger one must not burn the core that serves the sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if host.profile:
        options.enable_profiling = True
        options.profile_file_prefix = host.profile
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if host.device == "cuda":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _require_cuda() -> None:
    if not cuda_is_offered():
        raise DeviceUnavailable(
            "this onnxruntime has no CUDA: install conveyor[server-gpu] in place of conveyor[server], or use "
            "--device cpu"
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA and cuDNN libraries that came as Python packages


def _check_cuda(session: Any) -> None:
    found = session.get_providers()
    if not found or found[0] != _CUDA:
        raise DeviceUnavailable(
            "CUDA was asked for and onnxruntime fell back to the CPU: check `nvidia-smi`, the driver and the CUDA and "
            "cuDNN libraries that this onnxruntime needs, or use --device cpu"
        )
    strays = sorted(recurrent_elsewhere(session, _CUDA))
    if strays:
        raise DeviceUnavailable(
            f"onnxruntime put the recurrent operators {', '.join(strays)} on the CPU, where each step would copy the "
            "state: export the model without clip and custom activations, or use --device cpu"
        )


def recurrent_elsewhere(session: Any, provider: str) -> set[str]:
    """Names of recurrent operators that a session recorded for other providers than `provider`.

    Empty too on an older onnxruntime that cannot tell; it says so in the log.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        _log.warning("this onnxruntime is too old to tell which operators run on CUDA")
        return set()
    return {
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type in _RECURRENT
    }


def _why_not(model: onnx.ModelProto, name: str, folder: Path | None, error: Exception) -> str:
    told = str(error).strip().replace(str(folder), ".") if folder is not None else str(error).strip()
    opsets = ", ".join(f"{item.domain or 'ai.onnx'} {item.version}" for item in model.opset_import)
    return (
        f"onnxruntime {ort.__version__} does not load {name} (IR {model.ir_version}, opset {opsets}): "
        f"{type(error).__name__}: {told}"
    )
