"""Silero VAD as its makers publish it: the ONNX files, their own wrapper, and a minute of speech.

Everything is in one source archive, which is fetched once, checked by its hash, and kept in .cache.
"""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import wave
from pathlib import Path
from types import ModuleType

import numpy as np

VERSION = "6.2.3"
SHA256 = "d7a23b09202be4953915cb9173089bb307eed0418a9bd4794d9ec5af07fa1996"
RATE, STEP, CONTEXT = 16000, 512, 64
ROOT = Path(__file__).resolve().parents[2]


class Silero:
    """The archive, unpacked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def onnx(self, name: str = "silero_vad.onnx") -> Path:
        """One of its model files."""
        return self._folder / "src" / "silero_vad" / "data" / name

    def speech(self) -> np.ndarray:
        """A minute of people talking, at 16 kHz: float32 `[time steps, 512]`."""
        with wave.open(str(self._folder / "tests" / "data" / "test.wav")) as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        whole = samples[: len(samples) // STEP * STEP].astype(np.float32) / 32768
        return whole.reshape(-1, STEP)

    def wrapper(self, name: str = "silero_vad.onnx") -> "Wrapper":
        """Its makers' own way of stepping one stream."""
        return Wrapper(_module(self._folder / "src" / "silero_vad" / "utils_vad.py"), self.onnx(name))


class Wrapper:
    """One stream in the wrapper that comes with the model."""

    def __init__(self, module: ModuleType, path: Path) -> None:
        self._wrapper = module.OnnxWrapper(str(path), force_onnx_cpu=True)

    def run(self, steps: np.ndarray) -> np.ndarray:
        """The answers float32 `[time steps, 1]` to the steps `[time steps, 512]` of a stream from its beginning."""
        import torch

        self._wrapper.reset_states()
        return np.concatenate([self._wrapper(torch.from_numpy(step.copy()), RATE).numpy() for step in steps])


def fetch() -> Silero:
    """The archive; from the cache if it is there."""
    folder = ROOT / ".cache" / f"silero_vad-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wanted = Path(scratch) / "requirements.txt"
            wanted.write_text(f"silero-vad=={VERSION} --hash=sha256:{SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            command += ["--no-binary", ":all:", "--requirement", str(wanted), "--dest", scratch]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            with tarfile.open(Path(scratch) / f"silero_vad-{VERSION}.tar.gz") as archive:
                archive.extractall(scratch, filter="data")
            unpacked = Path(scratch) / f"silero_vad-{VERSION}"
            try:
                unpacked.rename(folder)
            except OSError:
                assert folder.is_dir(), "another worker may have been faster"
    return Silero(folder)


def _module(path: Path) -> ModuleType:
    """A module of the archive without its package, which wants what only its audio readers need."""
    spec = importlib.util.spec_from_file_location("silero_utils_vad", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
