"""The long form: round after round of fresh sessions on the same parts, under all faults, two at a time.

The last replica is never killed, so that its memory can be watched over the whole time; it is frozen and cut off like
the others. The first round that is judged bad ends it, and its logs stay.

    python -m tests.fault.soak --minutes 30 --seed 7
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault.faults import OF_REPLICAS, Kind
from tests.fault.memory import MemoryWatch
from tests.fault.resumes import Resume, quantile
from tests.fault.rig import Rig
from tests.fault.script import Settings
from tests.fault.trial import Outcome, Weather, run

_SESSIONS, _STEPS = 200, 240
_AT_ONCE = 2
_EVERY_S = 2.0
_LIMIT_S = 600.0
_MIB = 1 << 20


@dataclass(slots=True)
class Soaked:
    """What all rounds came to."""

    rounds: int = 0
    answers: int = 0
    wall_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    resumes: dict[Kind, list[Resume]] = field(default_factory=lambda: {kind: [] for kind in OF_REPLICAS})

    def add(self, outcome: Outcome) -> None:
        """One more round."""
        self.rounds += 1
        self.answers += outcome.verdict.answers
        self.wall_s += outcome.wall_s
        self.faults += outcome.faults
        for kind, resumes in outcome.resumes.items():
            self.resumes[kind] += resumes


def soak(folder: Path, minutes: float, seed: int, kinds: Sequence[Kind] = tuple(Kind)) -> bool:
    """Soaks, and tells as it goes; returns whether every round was good. Of one kind, one fault strikes at a time."""
    end_at = time.monotonic() + minutes * 60
    soaked = Soaked()
    good = True
    with Rig(folder) as rig, MemoryWatch(rig.replicas, _EVERY_S) as watch:
        at_once = _AT_ONCE if len(kinds) > 1 else 1
        weather = Weather(kinds, at_once=at_once, mortal=rig.replicas[:-1])
        while good and time.monotonic() < end_at:
            number = soaked.rounds + 1
            link = rig.to_envoy[soaked.rounds % len(rig.to_envoy)]
            settings = Settings(seed=seed + number, sessions=_SESSIONS, steps=_STEPS, prefix=f"w{number}")
            logs = folder / f"round-{number}"
            outcome = run(rig, settings, logs, weather, link=link, limit_s=_LIMIT_S)
            soaked.add(outcome)
            good = outcome.verdict.good
            _say(f"round {number}, seed {settings.seed}, {link.name}: {outcome}")
            if good:
                shutil.rmtree(logs)
    for line in _summary(soaked, watch):
        _say(line)
    (folder / "summary.json").write_text(json.dumps(_figures(soaked, watch), indent=1))
    return good


def _summary(soaked: Soaked, watch: MemoryWatch) -> list[str]:
    """The figures for people."""
    total = sum(soaked.faults.values())
    lines = [f"{soaked.rounds} rounds in {soaked.wall_s / 60:.1f} minutes: {soaked.answers:,} answers, {total} faults"]
    lines += [f"  {soaked.faults[kind.name]:5} {kind}" for kind in Kind]
    for name, values in _waits(soaked).items():
        p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
        most = max(values, default=float("nan"))
        lines.append(f"  {name}: {len(values)} sessions, p50 {p50:.2f} s, p99 {p99:.2f} s, most {most:.2f} s")
    for replica in sorted({life.replica for life in watch.lives.values()}):
        life = watch.longest(replica)
        if life is not None:
            first, last = life.mean_bytes(0.2, 0.4) / _MIB, life.mean_bytes(0.8, 1.0) / _MIB
            lines.append(
                f"  {replica}: longest life {life.lasted_s / 60:.1f} minutes, {first:.1f} MiB, then {last:.1f}"
            )
    return lines


def _figures(soaked: Soaked, watch: MemoryWatch) -> dict[str, object]:
    """The figures for programs."""
    return {
        "rounds": soaked.rounds,
        "answers": soaked.answers,
        "wall_s": round(soaked.wall_s, 1),
        "faults": dict(soaked.faults),
        "waits_s": {name: [round(value, 4) for value in sorted(values)] for name, values in _waits(soaked).items()},
        "lives": [
            {"replica": life.replica, "at_s": [round(at, 1) for at in life.at_s], "resident_bytes": life.resident_bytes}
            for life in watch.lives.values()
        ],
    }


def _waits(soaked: Soaked) -> dict[str, list[float]]:
    """Seconds by what they are of."""
    waits: dict[str, list[float]] = {}
    for kind, resumes in soaked.resumes.items():
        waits[f"{kind}, to the next answer"] = [resume.after_s for resume in resumes]
        waits[f"{kind}, of it waited for"] = [resume.waited_s for resume in resumes]
    return waits


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks; the exit status is 0 where all was well."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.soak", description="Faults, for long.")
    parser.add_argument("--minutes", type=float, default=30.0, help="a round that has begun is finished (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of everything; else one is chosen and told")
    parser.add_argument("--folder", type=Path, default=None, help="for logs and figures; else a temporary one")
    parser.add_argument(
        "--only", choices=[kind.name for kind in Kind], help="one kind of fault, for the time that it costs"
    )
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    folder = given.folder or Path(tempfile.mkdtemp(prefix="conveyor-soak-"))
    _say(f"soaking for {given.minutes:g} minutes with --seed {seed}; logs are in {folder}")
    kinds = tuple(Kind) if given.only is None else (Kind[given.only],)
    return 0 if soak(folder, given.minutes, seed, kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
