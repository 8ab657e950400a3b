"""Who used the CPU between two moments: the server, the load clients, and everyone else on the machine.

Invariant: a process's time is read from the kernel's own CPU clock of that process (nanoseconds, ended threads
included), not sampled; only the machine's total is in ticks of 10 ms.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Fields of /proc/stat's first line that are time of someone: user, nice, system, irq, softirq, steal.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
_STEAL_FIELD = 7


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds between two moments.

    Attributes:
        elapsed_s: wall time.
        server_s: of the process that answered.
        client_s: of the processes that asked, together.
        foreign_s: of all else on the machine, and of its host where the kernel is told (steal); never below 0.
        steal_s: the host's part of `foreign_s`.
    """

    elapsed_s: float
    server_s: float
    client_s: float
    foreign_s: float
    steal_s: float


@dataclass(frozen=True, slots=True)
class _Reading:
    at_s: float
    server_s: float
    client_s: float
    own_s: float
    busy_s: float
    steal_s: float


class Meter:
    """Reads the CPU clocks of a server and its clients, by process id; all must live until `stop`."""

    def __init__(self, server: int, clients: Sequence[int]) -> None:
        self._server = server
        self._clients = clients
        self._start = self._read()

    def stop(self) -> Usage:
        """Usage since the meter was made."""
        start, end = self._start, self._read()
        server_s, client_s = end.server_s - start.server_s, end.client_s - start.client_s
        known_s = server_s + client_s + end.own_s - start.own_s
        return Usage(
            elapsed_s=end.at_s - start.at_s,
            server_s=server_s,
            client_s=client_s,
            foreign_s=max(0.0, end.busy_s - start.busy_s - known_s),
            steal_s=end.steal_s - start.steal_s,
        )

    def _read(self) -> _Reading:
        busy_s, steal_s = machine_cpu_s()
        return _Reading(
            at_s=time.perf_counter(),
            server_s=process_cpu_s(self._server),
            client_s=sum(map(process_cpu_s, self._clients)),
            own_s=time.process_time(),
            busy_s=busy_s,
            steal_s=steal_s,
        )


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its threads so far, on the clock that clock_getcpuclockid(3) names.

    Raises:
        OSError: no such process.
    """
    return time.clock_gettime((~pid << 3) | 2)


def machine_cpu_s() -> tuple[float, float]:
    """CPU seconds that anyone used on the machine since it started, and those that its host kept to itself."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    hertz = os.sysconf("SC_CLK_TCK")
    return sum(ticks[index] for index in _BUSY_FIELDS) / hertz, ticks[_STEAL_FIELD] / hertz


def processor_name() -> str:
    """The CPU's name as the kernel tells it, or `unknown`."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
