"""What computes states on this machine, as far as it decides their bits.

Two servers of equal fingerprints give equal bits for equal steps; others may differ in the last ones.
"""

import platform
from pathlib import Path

import onnxruntime as ort

_CPU_FACTS = Path("/proc/cpuinfo")
# The instruction sets that onnxruntime's kernels choose by.
_FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_tile")
_ARM_FEATURES = ("asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve")


def fingerprint() -> str:
    """The version of onnxruntime, the machine's architecture and what its CPU can do."""
    return f"onnxruntime {ort.__version__}, {platform.machine()} {' '.join(_features()) or 'unknown'}"


def _features() -> list[str]:
    try:
        facts = _CPU_FACTS.read_text()
    except OSError:
        # Not Linux: the architecture is all there is to tell.
        return []
    for line in facts.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            has = set(value.split())
            return [feature for feature in (*_FEATURES, *_ARM_FEATURES) if feature in has]
    return []
