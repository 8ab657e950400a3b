"""Feeds decoders with inputs that are made to reach what no input has reached (atheris, on libFuzzer).

    python -m tests.fuzz.fuzz --inputs 1000000            all targets
    python -m tests.fuzz.fuzz --target step FILE          one input that was found

Invariant: a target is fuzzed in a process of its own, so that whatever an input does to it is told and ends no other;
an input that raises, takes over HANG_S, or makes Python and numpy allocate beyond the bound is a finding, and fails.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Tests' own support, as pytest finds it.
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import atheris

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

HANG_S = 10
MOST_MEMORY_MB = 4096
# What an input may have allocated at once: its own size many times over, and what any takes.
BYTES_EACH, BYTES_ANY = 200, 24 << 20
MOST_INPUT = 4096


class Finding(Exception):
    """An input did what no input may."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0: nothing was found; 1: something was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all targets together")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="draws the same inputs again")
    parser.add_argument("files", nargs="*", type=Path, help="inputs to try, instead of new ones")
    given = parser.parse_args(arguments)
    # What they import from here on is instrumented, so that the fuzzer sees which branches an input takes. It says so
    # of each module.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with quiet, atheris.instrument_imports(include=["conveyor_server", "conveyor_proto"]):
        from tests.fuzz.targets import targets
    chosen = [target for target in targets() if given.target in {None, target.name}]
    if not chosen:
        parser.error(f"there is no target {given.target!r}")
    if given.files:
        for target in chosen:
            for file in given.files:
                print(f"{target.name} {file}: {examined(target, file.read_bytes())}")
        return 0
    print(f"seed {given.seed}", flush=True)
    shares = sum(target.share for target in chosen)
    found = [fuzzed(target, max(1, given.inputs * target.share // shares), given.seed) for target in chosen]
    print(f"{sum(count for count, _ in found)} inputs, {sum(bad for _, bad in found)} findings")
    return int(any(bad for _, bad in found))


def examined(target: "Target", data: bytes) -> str:
    """What becomes of an input.

    Raises:
        Finding: it allocated more than it may.
        Exception: the target's own, which is a defect.
    """
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    outcome = target.run(data)
    _, peak = tracemalloc.get_traced_memory()
    if peak - before > BYTES_ANY + BYTES_EACH * len(data):
        raise Finding(f"{len(data)} bytes had {peak - before} allocated")
    return outcome


def fuzzed(target: "Target", inputs: int, seed: int) -> tuple[int, bool]:
    """Fuzzes a target in a child; returns how many inputs it had, and whether something was found."""
    folder = Path(mkdtemp(prefix=f"conveyor-fuzz-{target.name}-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    report = folder / "report.json"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with (folder / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _fuzz(target, inputs, seed, corpus, report)
        os._exit(3)  # libFuzzer ends the process itself
    _, status = os.waitpid(child, 0)
    told: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"inputs": 0, "outcomes": {}}
    took_s = time.monotonic() - began
    bad = status != 0 or told["inputs"] < inputs
    most = Counter(told["outcomes"]).most_common(6)
    outcomes = ", ".join(f"{name} {count}" for name, count in most)
    print(f"{target.name:13} {told['inputs']:8} in {took_s:6.1f} s  {'FOUND' if bad else 'ok'}  {outcomes}", flush=True)
    if bad:
        print((folder / "log").read_text(errors="replace")[-4000:])
        for file in sorted(folder.glob("*-*")):
            print(f"again: python -m tests.fuzz.fuzz --target {target.name} {file}")
    return int(told["inputs"]), bad


def _fuzz(target: "Target", inputs: int, seed: int, corpus: Path, report: Path) -> None:
    outcomes: Counter[str] = Counter()
    tracemalloc.start(1)
    # Tables that are made once are no input's.
    for data in (b"", *target.seeds):
        target.run(data)

    def one(data: bytes) -> None:
        outcomes[examined(target, data)] += 1
        if outcomes.total() == inputs:
            report.write_text(json.dumps({"inputs": inputs, "outcomes": outcomes}))
            os._exit(0)

    options = {
        "runs": -1,
        "seed": seed % 2**31,
        "timeout": HANG_S,
        "rss_limit_mb": MOST_MEMORY_MB,
        "max_len": MOST_INPUT,
        "artifact_prefix": f"{report.parent}/",
        "verbosity": 0,
    }
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
