"""The code blocks of a Markdown page, and a machine on which they are run in their order, as a reader would.

A server that a block starts runs on until another block starts one, as in the reader's first terminal; everything else
is run in a second one and must end well.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_READY_S = 60.0
_LINE_S = 120.0
_LOCALHOST = "localhost:50051"


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: its path in the repository.
        language: of a fence; "": it is indented, for a shell.
        text: without what every line is indented by.
    """

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """Its first line."""
        return self.text.splitlines()[0].strip()

    def lines(self) -> list[str]:
        """Commands, each on one line, without what is said of them."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for raw in joined.splitlines() if (line := re.split(r"\s+# ", raw)[0].strip())]


def blocks(page: str, text: str) -> Iterator[Block]:
    """All blocks of a page, in their order."""
    fence: list[str] | None = None
    language = ""
    indented: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if fence is not None:
            if line.startswith("```"):
                yield Block(page, language, "\n".join(fence))
                fence = None
            else:
                fence.append(line)
            continue
        if line.startswith("    ") or (indented and not line.strip()):
            indented.append(line[4:])
            continue
        if indented:
            yield Block(page, "", "\n".join(indented).strip())
            indented = []
        if line.startswith("```"):
            fence, language = [], line.removeprefix("```").strip()


class Machine:
    """A folder, two free ports in place of the usual ones, and at most one server.

    Args:
        folder: where commands are run.
        ports: of gRPC and of the metrics page.
        elsewhere: what stands in for addresses that only the page's writer has.
    """

    def __init__(self, folder: Path, ports: tuple[int, int], elsewhere: Mapping[str, str]) -> None:
        self.folder = folder
        port, self._metrics_port = ports
        self._instead = {_LOCALHOST: f"127.0.0.1:{port}", **elsewhere}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
        self._environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CONVEYOR_PORT": str(port),
            "CONVEYOR_METRICS_PORT": str(self._metrics_port),
            "CONVEYOR_TARGET": f"127.0.0.1:{port}",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        self._server: subprocess.Popen[bytes] | None = None
        self._log = folder / "server.log"

    def run(self, block: Block, statuses: Sequence[int] = (0,)) -> str:
        """Runs the commands of a block; returns what they printed."""
        printed = ""
        for line in map(self._placed, block.lines()):
            if shlex.split(line)[:2] == ["conveyor", "serve"]:
                self.stop()
                self._start(line)
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line],
                cwd=self.folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_LINE_S,
                check=False,
            )
            assert done.returncode in statuses, f"{line}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
        return printed

    def run_python(self, block: Block, before: str) -> None:
        """Runs a block of Python, after some lines that make what it is given."""
        code = self._placed(f"{before}\n{block.text}\n")
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_LINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{block.name}\n{done.stderr}"

    def write(self, block: Block) -> None:
        """Writes a block to the file that its first line names: `# spotter.py`."""
        (self.folder / block.name.removeprefix("# ")).write_text(self._placed(block.text) + "\n")

    def stop(self) -> None:
        """Ends the server as Ctrl-C does, in order."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            assert self._server.wait(30) == 0, self._log.read_text()
            self._server = None

    def end(self) -> None:
        """Leaves no server behind, whatever went wrong."""
        if self._server is not None:
            self._server.kill()
            self._server.wait(10)
            self._server = None

    def _placed(self, text: str) -> str:
        for there, here in self._instead.items():
            text = text.replace(there, here)
        return text

    def _start(self, line: str) -> None:
        with self._log.open("ab") as log:
            # No shell between, so that a signal is the server's.
            command = shlex.split(line)
            self._server = subprocess.Popen(
                command, cwd=self.folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + _READY_S
        while not self._is_ready():
            if self._server.poll() is not None or time.monotonic() > until:
                self.end()
                raise AssertionError(f"{line}\n{self._log.read_text()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self._metrics_port}/readyz"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
        return False
