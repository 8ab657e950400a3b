"""Where models would run: what was asked for, and what onnxruntime really has.

Invariant: CUDA counts as there once a graph has been opened on it, and not before.
"""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.runner.provider import cuda_is_offered, why_no_cuda
from conveyor_server.settings import Settings

_BUILDS = ("onnxruntime", "onnxruntime-gpu")
# There where the driver is loaded, and in containers that were given a GPU.
_DRIVER = Path("/dev/nvidiactl")


def check(settings: Settings) -> Iterator[Finding]:
    """The device, and the builds of onnxruntime."""
    builds = [name for name in _BUILDS if _is_installed(name)]
    if len(builds) > 1:
        yield warning(
            "onnxruntime and onnxruntime-gpu are both installed, over each other: nobody knows which one this is",
            "pip uninstall both, and pip install 'conveyor[server]' or 'conveyor[server-gpu]'",
        )
    yield judged(settings.device, offered=cuda_is_offered(), why_not=why_no_cuda(), has_gpu=_DRIVER.exists())


def judged(device: str, *, offered: bool, why_not: str, has_gpu: bool) -> Finding:
    """What the setting comes to.

    Args:
        device: the setting.
        offered: this onnxruntime was built with CUDA.
        why_not: why no graph opens on CUDA; "": one does.
        has_gpu: this machine has the driver of a GPU.
    """
    if device == "cpu":
        return good("device cpu")
    if not why_not:
        return good(f"device {device}: a graph was opened on CUDA")
    if device == "cuda":
        return bad(f"device cuda: {why_not}", "see to it that CUDA is there, or --device cpu")
    if has_gpu and not offered:
        return warning(
            "device auto will be the cpu: this machine has a GPU, and this onnxruntime no CUDA",
            "pip uninstall onnxruntime and pip install 'conveyor[server-gpu]', or say --device cpu",
        )
    if offered:
        return warning(f"device auto will be the cpu: {why_not}", "see to it that CUDA is there, or say --device cpu")
    return good("device auto will be the cpu: this onnxruntime has no CUDA, and this machine no GPU")


def _is_installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))
