"""`make profile`: a flame graph of the server under the load of one case of the bench, sampled by py-spy."""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accounting import Meter
from benchmarks.cases import SERVED, Case, groups
from benchmarks.load import LoadDriver
from benchmarks.rig import export_models
from benchmarks.service import Service
from benchmarks.worker import Worker, WorkerError

_OUT = Path(__file__).parent / "out"
_TRACEABLE = (sys.executable, "-m", "benchmarks.traceable")
_WARM_UP_S = 1.0
# The load outlasts the sampling: py-spy reads the server's symbols first.
_MARGIN_S = 2.0
_REFUSED = ("permission denied", "operation not permitted", "os error 1)", "os error 13")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    Attributes:
        case: the load.
        seconds: of sampling.
        rate: samples per second.
        native: frames of C and C++ too.
        transport: of the server.
        path: the picture.
    """

    case: Case
    seconds: float
    rate: int
    native: bool
    transport: str
    path: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples and writes the picture; returns the exit status."""
    settings = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda got, _: sys.exit(128 + got))
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    program = _py_spy()
    if program is None:
        _say("py-spy is not installed: pip install 'conveyor[bench]'")
        return 2
    settings.path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conveyor-bench-")))
        _say("exporting the models")
        export_models(folder / "models")
        flags = ("--diagnostics", "--transport", settings.transport)
        service = Service(folder / "models", folder, *flags, launcher=_TRACEABLE)
        stack.callback(service.stop)
        load = Worker(LoadDriver, dict.fromkeys(SERVED, service.address))
        stack.callback(load.close)
        return _sample(settings, program, service, load)


def _sample(settings: Settings, program: str, service: Service, load: Worker) -> int:
    """Puts the load on while py-spy looks."""
    case = settings.case
    load.open(case)
    load.run(case, _WARM_UP_S)
    _say(f"sampling {case.name}: {settings.seconds:g} s")
    command = [program, "record", "--pid", str(service.pid), "--output", str(settings.path), "--format", "flamegraph"]
    command += ["--duration", f"{settings.seconds:.0f}", "--rate", str(settings.rate)]
    command += ["--native"] if settings.native else ["--nonblocking"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spy:
        try:
            meter = Meter(service.pid, [load.pid])
            done = load.run(case, settings.seconds + _MARGIN_S)
            usage = meter.stop()
            told, _ = spy.communicate(timeout=settings.seconds + 60)
        except BaseException:
            spy.kill()
            raise
    if spy.returncode or not settings.path.is_file():
        _say(explain(told))
        return 1
    # py-spy holds the server while it looks, so it is slower than in the bench.
    print(f"{case.name}, while sampled: {done.tokens / usage.elapsed_s:,.0f} tokens/s")
    print(f"wrote {os.path.relpath(settings.path)}")
    return 0


def explain(told: str) -> str:
    """What to do about a failure of py-spy's, from what it said."""
    if any(sign in told.lower() for sign in _REFUSED):
        told = (
            "the kernel does not let py-spy look into the server. In a container, add the capability SYS_PTRACE; "
            "elsewhere see kernel.yama.ptrace_scope: 0 or 1 is enough, 2 takes root. py-spy said:\n" + told
        )
    return f"py-spy failed: {told.strip()}"


def _py_spy() -> str | None:
    """Beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--sessions", type=int, default=256, help="largest population (%(default)s)")
    parser.add_argument("--case", default="streams/full", help="which, as make bench names it (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sampling (%(default)s)")
    parser.add_argument("--rate", type=int, default=200, help="samples per second (%(default)s)")
    parser.add_argument("--native", action="store_true", help="frames of C and C++ too: gRPC, onnxruntime")
    parser.add_argument("--transport", choices=("cq", "aio"), default="cq", help="of the server (%(default)s)")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder of the picture (%(default)s)")
    given = parser.parse_args(arguments)
    cases = {
        case.name: case
        for group in groups(given.sessions, given.transport)
        for case in group.cases
        if case.target in SERVED
    }
    if given.case not in cases:
        parser.error(f"there is no case {given.case}, only {', '.join(cases)}")
    path = given.out / f"profile-{given.case.replace('/', '-')}.svg"
    return Settings(cases[given.case], given.seconds, given.rate, given.native, given.transport, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerError as error:
        sys.exit(f"benchmarks.profile: {error}")
