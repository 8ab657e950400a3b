"""One run: clients play a script while faults strike, and then their logs are judged.

Invariant: faults strike from the moment when every session has begun to the end of the last client; all that follows
from the seed (who does what, which faults in which order) is the same again with it, though not the moment of each.
"""

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault.checker import EXPECTED, Verdict, judge_folder
from tests.fault.client import BEGUN
from tests.fault.faults import FAULTS, OF_REPLICAS, FaultLog, Kind, Striker, in_random_order, read_faults
from tests.fault.model import write_expected
from tests.fault.process import Process
from tests.fault.proxy import Link
from tests.fault.replica import ROOT, Replica
from tests.fault.resumes import Resume, resumes
from tests.fault.rig import Rig
from tests.fault.script import CLIENTS, Script, Settings

_BEGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Weather:
    """Which faults strike, and how often.

    Attributes:
        kinds: in a random order; none: a calm day.
        gap_s: between the end of one and the next, at least and at most.
        at_once: how many may be under way.
        mortal: replicas that may be killed and ended; None: all.
    """

    kinds: Sequence[Kind] = tuple(Kind)
    gap_s: tuple[float, float] = (0.3, 1.0)
    at_once: int = 1
    mortal: Sequence[Replica] | None = None


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        verdict: the checker's.
        faults: how often each kind struck.
        resumes: how long sessions waited that were on a replica when it was struck, by the kind of fault.
        wall_s: how long it took.
        said: what the clients wrote to their standard outputs: nothing, if all is well.
    """

    verdict: Verdict
    faults: Counter[str] = field(default_factory=Counter)
    resumes: dict[Kind, list[Resume]] = field(default_factory=dict)
    wall_s: float = 0.0
    said: str = ""

    def __str__(self) -> str:
        """In words."""
        struck = ", ".join(f"{count} x {Kind[name]}" for name, count in sorted(self.faults.items())) or "no faults"
        return f"{self.verdict}\n  in {self.wall_s:.1f} s; {struck}"


def run(rig: Rig, settings: Settings, folder: Path, weather: Weather, *, link: Link, limit_s: float) -> Outcome:
    """Plays a script on a rig that runs.

    Args:
        rig: all its parts run, and run again when this returns.
        settings: of the script; the seed decides about the faults too.
        folder: for the logs; must not be there yet.
        weather: the faults.
        link: what the clients connect to.
        limit_s: clients that take longer are killed.

    Raises:
        AssertionError: a part of the rig or a client did not do what it is there for.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    script = Script(settings)
    write_expected(rig.model, script, folder / EXPECTED)
    clients = [_client(settings, index, link, folder) for index in range(CLIENTS)]
    stop = threading.Event()
    with (folder / FAULTS).open("w", encoding="utf-8") as sink:
        strikers = _strikers(rig, FaultLog(sink), settings.seed, weather, stop)
        try:
            for client in clients:
                client.start()
            for index, client in enumerate(clients):
                client.wait_until((folder / f"{BEGUN}-{index}").exists, _BEGIN_S)
            for striker in strikers:
                striker.start()
            in_time = _wait(clients, strikers, began + limit_s)
        finally:
            stop.set()
            for client in clients:
                client.kill()
            for striker in strikers:
                striker.end()
    if not in_time:
        raise AssertionError(f"the clients take longer than {limit_s:g} s; until then {judge_folder(folder)}")
    rig.heal()
    faults = read_faults(folder)
    return Outcome(
        verdict=judge_folder(folder),
        faults=Counter(fault["fault"] for fault in faults),
        resumes={kind: resumes(folder, faults, kind.name) for kind in OF_REPLICAS},
        wall_s=time.monotonic() - began,
        said="".join(client.tail() for client in clients),
    )


def _wait(clients: Sequence[Process], strikers: Sequence["_Striking"], until: float) -> bool:
    """Waits for the clients, and fails with a striker that fails; False: they take too long."""
    while any(client.running for client in clients):
        for striker in strikers:
            striker.check()
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    for client in clients:
        status = client.wait(1.0)
        if status != 0:
            raise AssertionError(f"a client ended with status {status}\n{client.tail()}")
    return True


class _Striking:
    """Strikes in a thread of its own until it is told to stop."""

    def __init__(
        self,
        striker: Striker,
        kinds: Sequence[Kind],
        gap_s: tuple[float, float],
        chance: random.Random,
        stop: threading.Event,
    ) -> None:
        self._striker = striker
        self._kinds = kinds
        self._gap_s = gap_s
        self._chance = chance
        self._stop = stop
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="striker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Waits for the fault that is under way."""
        if self._thread.ident is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise AssertionError(f"a fault went wrong: {error}") from error

    def _run(self) -> None:
        try:
            for kind in in_random_order(self._kinds, self._chance):
                if self._stop.wait(self._chance.uniform(*self._gap_s)):
                    return
                self._striker.strike(kind)
        except BaseException as error:
            self._error = error


def _strikers(rig: Rig, log: FaultLog, seed: int, weather: Weather, stop: threading.Event) -> list[_Striking]:
    if not weather.kinds:
        return []
    mortal = rig.replicas if weather.mortal is None else weather.mortal
    threads = []
    for number in range(weather.at_once):
        chance = random.Random(f"faults {seed} {number}")
        striker = Striker(rig, log, chance, mortal)
        threads.append(_Striking(striker, weather.kinds, weather.gap_s, chance, stop))
    return threads


def _client(settings: Settings, index: int, link: Link, folder: Path) -> Process:
    command = [sys.executable, "-m", "tests.fault.client", settings.to_json(), str(index)]
    command += [f"127.0.0.1:{link.port}", str(folder)]
    return Process(command, folder / f"client-{index}.log", folder=ROOT)
