"""The replicas' memory over time, looked at from outside.

A replica that is killed begins anew, so each of its lives is told by itself; what one that is never killed takes over
half an hour is the figure that counts.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from tests.fault.replica import Replica


@dataclass(slots=True)
class Life:
    """One process.

    Attributes:
        replica: its name.
        at_s: when it was looked at, in seconds since the beginning.
        resident_bytes: what it had in RAM then.
    """

    replica: str
    at_s: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)

    @property
    def lasted_s(self) -> float:
        """From the first look to the last."""
        return self.at_s[-1] - self.at_s[0]

    def mean_bytes(self, first: float, last: float) -> float:
        """The mean between two shares of its life."""
        begin, length = self.at_s[0], self.lasted_s
        inside = [
            size
            for at, size in zip(self.at_s, self.resident_bytes, strict=True)
            if begin + first * length <= at <= begin + last * length
        ]
        return sum(inside) / len(inside)


class MemoryWatch:
    """Looks at replicas again and again, in a thread of its own. A context manager.

    Attributes:
        lives: by process id, in the order of their beginnings.
    """

    def __init__(self, replicas: Sequence[Replica], every_s: float) -> None:
        self.lives: dict[int, Life] = {}
        self._replicas = replicas
        self._every_s = every_s
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def longest(self, replica: str) -> Life | None:
        """The longest life of a replica."""
        lives = [life for life in self.lives.values() if life.replica == replica]
        return max(lives, key=lambda life: life.lasted_s, default=None)

    def __enter__(self) -> Self:
        """Begins."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            for replica in self._replicas:
                size = replica.resident_bytes
                if size:
                    life = self.lives.setdefault(replica.pid, Life(replica.name))
                    life.at_s.append(time.monotonic() - self._began)
                    life.resident_bytes.append(size)
