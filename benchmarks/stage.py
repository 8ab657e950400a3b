"""What a measurement stands on: an exported model, servers of it, and processes that put load on; all end with it.

Invariant: whatever was started is stopped when the stage is left, in the reverse order, however it is left.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.service import Service

# Where a repository is that `python -m benchmarks.model` has made: it is used as it is, and nothing is exported.
# Not a name of the server's: it takes none that it does not know.
MODELS_VARIABLE = "BENCH_MODELS"
# As benchmarks.model names it: 2048 bytes of state a session.
MODEL = "bench-lstm"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Stage:
    """Servers over one model repository. Made by `stage`.

    Attributes:
        models: the repository; it holds the bench's LSTM.
        undo: what else is to be ended with the stage.
    """

    def __init__(self, models: Path, folder: Path, undo: contextlib.ExitStack) -> None:
        self.models = models
        self.undo = undo
        self._folder = folder
        self._servers = 0

    def serve(self, *flags: str) -> Service:
        """A server that is ready.

        Raises:
            WorkerError: it did not start.
        """
        self._servers += 1
        folder = self._folder / f"server-{self._servers}"
        folder.mkdir()
        service = Service(self.models, folder, *flags)
        self.undo.callback(service.stop)
        return service


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Exports the model, in a process of its own, unless MODELS_VARIABLE names one; makes room for servers of it."""
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="conveyor-bench-")))
        given = os.environ.get(MODELS_VARIABLE)
        models = Path(given) if given else folder / "models"
        if not given:
            say("exporting the model")
            export = [sys.executable, "-m", "benchmarks.model", str(models)]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        yield Stage(models, folder, undo)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM, in bytes; pages that it never wrote are not."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


def say(text: str) -> None:
    """Tells whoever waits, beside the report."""
    print(text, file=sys.stderr, flush=True)
