"""What the machine gives the process, against what the settings may ask of it: open files, memory, CPU.

Invariant: limits of the container count before the machine's; what has no limit is as large as the machine.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.doctor.models import Readable, readable
from conveyor_server.engine.engine import EngineLimits
from conveyor_server.repository.policy import MAX_BATCH
from conveyor_server.settings import Settings

# What a process has open besides connections: models, the store, the log, gRPC's own.
_OWN_FILES = 256
# A server without a model, resident.
_OWN_BYTES = 120_000_000
# Of the memory: what is more leaves none for runs, messages and answers.
_FULL, _NEARLY = 1.0, 0.8
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the process has.

    Attributes:
        files: it may have open.
        hard_files: it may ask for.
        cpus: it may run on.
        quota: CPUs' worth of time that its container has; None: as much as there is.
        memory_bytes: of its container or, where that has no limit, of the machine; None: nobody knows.
    """

    files: int
    hard_files: int
    cpus: int
    quota: float | None
    memory_bytes: int | None


def check(settings: Settings) -> Iterator[Finding]:
    """Open files, memory, CPU."""
    machine = look()
    yield files(settings, machine)
    yield memory(settings, machine, readable(settings))
    yield from cpu(settings, machine)


def files(settings: Settings, machine: Machine) -> Finding:
    """Connections are open files; in the worst case each session comes over one of its own."""
    most = machine.files - _OWN_FILES
    if most >= settings.max_sessions:
        return good(f"{machine.files:,} open files: a connection for each of {settings.max_sessions:,} sessions")
    wanted = settings.max_sessions + _OWN_FILES
    return warning(
        f"{machine.files:,} open files are {max(0, most):,} connections, and {settings.max_sessions:,} sessions may "
        "come over one each",
        f"ulimit -n {wanted} (systemd: LimitNOFILE={wanted})"
        + ("" if machine.hard_files >= wanted else f", the hard limit {machine.hard_files:,} too")
        + "; or lower --max-sessions, where clients share streams it is enough",
    )


def memory(settings: Settings, machine: Machine, models: Sequence[Readable]) -> Finding:
    """What the process may come to hold when every session is there, of the largest model."""
    capacity = EngineLimits(max_batch=settings.max_batch or MAX_BATCH).capacity(settings.max_sessions)
    slabs = sum(model.state_bytes * capacity for model in models)
    weights = sum(model.file_bytes for model in models)
    if 0 < settings.max_state_bytes < slabs:
        return bad(
            f"the states of {len(models)} models take {_size(slabs)} for {settings.max_sessions:,} sessions, and "
            f"max_state_bytes is {_size(settings.max_state_bytes)}: the models beyond it are refused",
            "lower --max-sessions, take models out of the folder, or raise --max-state-bytes",
        )
    each = slabs + weights + _OWN_BYTES
    whole = each * settings.workers
    told = (
        f"{_size(whole)} for {settings.max_sessions:,} sessions ({_size(slabs)} of state for {len(models)} models, "
        f"{_size(weights)} of weights" + (f", {settings.workers} workers" if settings.workers > 1 else "") + ")"
    )
    if machine.memory_bytes is None:
        return good(f"{told}; how much memory there is cannot be asked here")
    there = f"{_size(machine.memory_bytes)} of memory"
    fix = "lower --max-sessions or --workers, take models out of the folder, or give it more memory"
    if whole > _FULL * machine.memory_bytes:
        return bad(f"{there}, and it may come to {told}", fix)
    if whole > _NEARLY * machine.memory_bytes:
        return warning(f"{there}, and it may come to {told}", fix)
    return good(f"{there}; it may come to {told}")


def cpu(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Threads and workers against CPUs, and what a container's quota does to them."""
    there = machine.cpus if machine.quota is None else min(machine.cpus, machine.quota)
    told = f"{machine.cpus} CPUs" + ("" if machine.quota is None else f", of which it may use {machine.quota:g}")
    wanted = settings.threads * settings.workers
    if wanted > there:
        yield warning(
            f"{told}, and {settings.workers} workers of {settings.threads} threads want {wanted}: they wait for each "
            "other",
            "lower --threads or --workers, or give it more CPUs",
        )
    elif machine.quota is not None and machine.quota < 1:
        yield warning(
            f"{told}: it stands still for a part of each tenth of a second, and so does every step",
            "give it a whole CPU at least",
        )
    else:
        yield good(f"{told}; {settings.workers} workers of {settings.threads} threads")


def look() -> Machine:
    """What this process has."""
    soft, hard = (
        limit if limit != resource.RLIM_INFINITY else 1 << 40 for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    total = _total_memory()
    of_container = memory_limit(_CGROUP)
    known = [size for size in (total, of_container) if size is not None]
    return Machine(soft, hard, len(os.sched_getaffinity(0)), cpu_quota(_CGROUP), min(known, default=None))


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time of the control group whose folder this is, in either version; None: no limit."""
    words = _words(root / "cpu.max")
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota, period = (_words(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def memory_limit(root: Path) -> int | None:
    """Bytes of the control group whose folder this is, in either version; None: no limit."""
    words = _words(root / "memory.max") or _words(root / "memory" / "memory.limit_in_bytes")
    return int(words[0]) if words and words[0] != "max" else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _total_memory() -> int | None:
    words = _words(_MEMORY_INFO)
    return int(words[words.index("MemTotal:") + 1]) * 1024 if "MemTotal:" in words else None


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
