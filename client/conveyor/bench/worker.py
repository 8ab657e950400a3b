"""One process of a load: carries out what the fleet says, and tells what came of it.

Invariant: whatever goes wrong is told in words before the process ends; between two commands it does nothing but answer
the server's pings.
"""

import gc
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe

from conveyor.bench.histogram import Histogram
from conveyor.bench.load import Load
from conveyor.bench.result import LoadResult
from conveyor.bench.spec import LoadError, LoadSpec

# Servers ping connections that are silent for some tens of seconds.
_TEND_S = 5.0


@dataclass(frozen=True, slots=True)
class Open:
    """Connect, and attach all sessions. Answered by None."""


@dataclass(frozen=True, slots=True)
class Run:
    """Put the load on. Answered by LoadResult, after Snapshots if `tell`."""

    seconds: float
    tell: bool


@dataclass(frozen=True, slots=True)
class Close:
    """Close all sessions. Answered by None; then the process ends."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run as it stands.

    Attributes:
        elapsed_s: since it began.
        steps: answered.
        refused: not applied.
        latency: so far.
    """

    elapsed_s: float
    steps: int
    refused: int
    latency: Histogram


@dataclass(frozen=True, slots=True)
class Failure:
    """The load broke; the process ends."""

    message: str
    reason: str


def work(pipe: Pipe, target: str, spec: LoadSpec) -> None:
    """The process's main function."""
    # Ctrl-C reaches all processes of the terminal; the fleet ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load = Load(target, spec)
    try:
        _obey(pipe, load)
    except LoadError as error:
        # First, as the fleet ends this process when it is told.
        load.close()
        pipe.send(Failure(str(error), error.reason))
    except (EOFError, ConnectionError):
        # The fleet is gone, and nobody is left to tell.
        return
    finally:
        load.close()


def _obey(pipe: Pipe, load: Load) -> None:
    opened = False
    while True:
        while not pipe.poll(_TEND_S):
            if opened:
                load.tend()
        command = pipe.recv()
        match command:
            case Open():
                load.open()
                opened = True
                # What lives until the end is not worth looking through in the middle of a run.
                gc.collect()
                gc.freeze()
                pipe.send(None)
            case Run(seconds, tell):
                pipe.send(load.run(seconds, (lambda result: pipe.send(_snapshot(result))) if tell else None))
            case Close():
                load.close()
                pipe.send(None)
                return


def _snapshot(result: LoadResult) -> Snapshot:
    refused = sum(took.count for took in result.refused.values())
    return Snapshot(result.elapsed_s, result.steps, refused, result.latency)
