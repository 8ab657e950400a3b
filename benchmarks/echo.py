"""A bare echo beside the server: a program of its own that prints its port."""

import subprocess
import sys

from benchmarks.worker import WorkerError

_STOP_TIMEOUT_S = 10.0


class Echo:
    """A running echo; it takes calls when the constructor returns.

    Args:
        module: benchmarks.cq_echo or benchmarks.aio_echo.
    """

    def __init__(self, module: str) -> None:
        # A session of its own: Ctrl-C is for the bench, which ends its processes in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        port = self._process.stdout.readline() if self._process.stdout else ""
        if not port:
            self.stop()
            raise WorkerError(f"{module} did not start: it ended with status {self._process.returncode}")
        self.address = f"127.0.0.1:{int(port)}"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def stop(self) -> None:
        """Ends it; whoever is connected is cut off."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
