"""All processes of a bench: server, bare echoes, load client and bare onnxruntime.

Invariant: only one of those that answer has work at a time; all end with the rig, whatever happens.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bare import BareDriver
from benchmarks.cases import Target
from benchmarks.echo import Echo
from benchmarks.load import LoadDriver
from benchmarks.segments import Rig
from benchmarks.service import Service
from benchmarks.worker import Worker

_ECHOES = {Target.CQ_ECHO: "benchmarks.cq_echo", Target.AIO_ECHO: "benchmarks.aio_echo"}


def export_models(repository: Path) -> None:
    """Writes the bench's models, in a process of its own: torch is gone before anything is measured."""
    export = [sys.executable, "-m", "benchmarks.model", str(repository)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def rig(repository: Path, folder: Path, transport: str) -> Iterator[Rig]:
    """Starts all processes.

    Args:
        repository: the models.
        folder: where the server's log goes.
        transport: of the server.

    Raises:
        WorkerError: one did not start; the message says why.
    """
    with contextlib.ExitStack() as stack:
        service = Service(repository, folder, "--diagnostics", "--transport", transport)
        stack.callback(service.stop)
        echoes = {}
        for target, module in _ECHOES.items():
            echoes[target] = Echo(module)
            stack.callback(echoes[target].stop)
        served = dict.fromkeys((Target.ECHO, Target.NULL, Target.FULL), service.address)
        load = Worker(LoadDriver, {**served, **{target: echo.address for target, echo in echoes.items()}})
        stack.callback(load.close)
        bare = Worker(BareDriver, repository)
        stack.callback(bare.close)
        yield Rig(
            servers={
                **dict.fromkeys(served, service.pid),
                **{target: echo.pid for target, echo in echoes.items()},
                Target.BARE: bare.pid,
            },
            load=load,
            bare=bare,
            batches=service.batches,
        )
