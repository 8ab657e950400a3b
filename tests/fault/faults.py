"""The faults: what is done to whom, for how long, and how it is undone; which comes next is drawn from a seed.

Invariant: a fault is over when `strike` returns: everything that it took is there again.
"""

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from tests.fault.proxy import Link
from tests.fault.replica import Replica
from tests.fault.rig import Rig

FAULTS = "faults.jsonl"


class Kind(StrEnum):
    """What can be done."""

    KILL = "replica killed (-9) and started"
    FREEZE = "replica frozen (STOP, CONT)"
    TERM = "replica ended in order (TERM) and started"
    STORE_KILL = "store killed (-9) and started"
    STORE_CUT = "connections to the store cut"
    STORE_SLOW = "connections to the store slow"
    STORE_STALL = "connections of one replica to the store stalled"
    CLIENTS_CUT = "connections of clients cut"
    CLIENTS_SLOW = "connections of clients slow"


# What moves the sessions of a replica to another.
OF_REPLICAS = (Kind.KILL, Kind.TERM, Kind.FREEZE)


class FaultLog:
    """What was done and when, a line each; any thread."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._lock = threading.Lock()

    def write(self, kind: Kind, **told: Any) -> None:
        """Adds a line with the time on the clock of the machine."""
        with self._lock:
            line = {"at": round(time.monotonic(), 6), "fault": kind.name, **told}
            self._sink.write(json.dumps(line) + "\n")
            self._sink.flush()


def read_faults(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's log."""
    return [json.loads(line) for line in (folder / FAULTS).read_text(encoding="utf-8").splitlines()]


def in_random_order(kinds: Sequence[Kind], chance: random.Random) -> Iterator[Kind]:
    """All of them in a random order, and again in another, without end."""
    while True:
        yield from chance.sample(kinds, len(kinds))


class Striker:
    """Strikes a rig. Several may strike one rig at a time, each in a thread of its own; one replica is always left.

    Args:
        rig: what is struck.
        log: where it is written down.
        chance: who is struck, and for how long.
        mortal: replicas that may be killed and ended; the others are frozen and cut off at most.
    """

    def __init__(self, rig: Rig, log: FaultLog, chance: random.Random, mortal: Sequence[Replica]) -> None:
        self._rig = rig
        self._log = log
        self._chance = chance
        self._mortal = mortal
        self._strikes = {
            Kind.KILL: self._kill,
            Kind.FREEZE: self._freeze,
            Kind.TERM: self._term,
            Kind.STORE_KILL: self._kill_store,
            Kind.STORE_CUT: self._cut_store,
            Kind.STORE_SLOW: self._slow_store,
            Kind.STORE_STALL: self._stall_store,
            Kind.CLIENTS_CUT: self._cut_clients,
            Kind.CLIENTS_SLOW: self._slow_clients,
        }

    def strike(self, kind: Kind) -> None:
        """Does it and undoes it."""
        self._strikes[kind]()

    def _kill(self) -> None:
        with self._rig.down(self._mortal, self._chance) as replica:
            self._log.write(Kind.KILL, replica=replica.name, held=replica.held())
            replica.kill()
            self._back(replica)

    def _freeze(self) -> None:
        with self._rig.down(self._rig.replicas, self._chance) as replica:
            frozen_s = self._chance.uniform(1.0, 4.0)
            self._log.write(Kind.FREEZE, replica=replica.name, held=replica.held(), frozen_s=round(frozen_s, 3))
            replica.freeze()
            time.sleep(frozen_s)
            replica.thaw()
            replica.wait_ready()

    def _term(self) -> None:
        with self._rig.down(self._mortal, self._chance) as replica:
            self._log.write(Kind.TERM, replica=replica.name, held=replica.held())
            status = replica.terminate()
            if status != 0:
                raise AssertionError(f"{replica.name} ended with status {status}\n{replica.tail()}")
            self._back(replica)

    def _back(self, replica: Replica) -> None:
        time.sleep(self._chance.uniform(0.0, 1.0))
        replica.start()
        replica.wait_ready()

    def _kill_store(self) -> None:
        if self._rig.valkey is None:
            raise AssertionError("this rig has no store")
        away_s = self._chance.uniform(0.1, 2.0)
        with self._rig.store_turn:
            self._log.write(Kind.STORE_KILL, away_s=round(away_s, 3))
            self._rig.valkey.kill()
            time.sleep(away_s)
            self._rig.valkey.start()

    def _cut_store(self) -> None:
        links = self._chance.sample(self._rig.to_store, self._chance.randint(1, len(self._rig.to_store)))
        self._cut(Kind.STORE_CUT, links, 1.0)

    def _slow_store(self) -> None:
        self._slow(Kind.STORE_SLOW, self._rig.to_store, self._chance.uniform(0.02, 0.2))

    def _stall_store(self) -> None:
        link = self._chance.choice(self._rig.to_store)
        stalled_s = self._chance.uniform(0.5, 3.0)
        self._log.write(Kind.STORE_STALL, link=link.name, stalled_s=round(stalled_s, 3))
        link.stall()
        time.sleep(stalled_s)
        link.flow()

    def _cut_clients(self) -> None:
        self._cut(Kind.CLIENTS_CUT, self._rig.to_envoy, self._chance.choice((0.3, 0.6, 1.0)))

    def _slow_clients(self) -> None:
        self._slow(Kind.CLIENTS_SLOW, self._rig.to_envoy, self._chance.uniform(0.02, 0.15))

    def _cut(self, kind: Kind, links: Sequence[Link], share: float) -> None:
        """Cuts while much is on its way: what was done, and whose answer is lost, is what it is about."""
        delay_s = self._chance.uniform(0.02, 0.1)
        for link in links:
            link.slow(delay_s)
        time.sleep(3 * delay_s)
        cut = sum(link.cut(share, self._chance) for link in links)
        self._log.write(kind, links=[link.name for link in links], connections=cut)
        for link in links:
            link.slow(0.0)

    def _slow(self, kind: Kind, links: Sequence[Link], delay_s: float) -> None:
        slow_s = self._chance.uniform(0.5, 2.0)
        self._log.write(kind, delay_s=round(delay_s, 3), slow_s=round(slow_s, 3))
        for link in links:
            link.slow(delay_s)
        time.sleep(slow_s)
        for link in links:
            link.slow(0.0)
