"""One measured second of one case, and the rounds that they come in.

Invariant: in a round of a group every case of it runs once, one after the other; a segment that something disturbed is
kept, with the reasons why it does not count.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.accounting import Meter, Usage, machine_cpu_s
from benchmarks.cases import SDK, SERVED, Case, Client, Group, Target
from benchmarks.figures import Done, Figures
from benchmarks.worker import Worker

# Share of one core that others may use while a segment counts.
MAX_FOREIGN_CORES = 0.10
# The load client is one process of Python: near one core, it is what is measured.
MAX_CLIENT_CORES = 0.80
_WARM_UP_S = 0.2
# The machine's clock has ticks of 10 ms.
_LOOK_S = 0.3


@dataclass(frozen=True, slots=True)
class Segment:
    """What one run of one case gave.

    Attributes:
        case: Case.name.
        round: 0, 1, ...
        done: tokens and messages.
        usage: CPU; for bare onnxruntime the loop is the server, and there is no client.
        figures: what the client saw.
        mean_batch: sessions in one run of the model, as the server's own metrics count; 0: an echo runs none.
        client_bound: the client took so much CPU that it was the limit, and the segment counts all the same.
        void: why the segment does not count; empty: it does.
    """

    case: str
    round: int
    done: Done
    usage: Usage
    figures: Figures
    mean_batch: float
    client_bound: bool
    void: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens answered per second of wall time."""
        return self.done.tokens / self.usage.elapsed_s

    @property
    def tokens_per_server_cpu_s(self) -> float:
        """Tokens answered per second of the server's CPU time."""
        return self.done.tokens / self.usage.server_s

    @property
    def server_us_per_token(self) -> float:
        """Microseconds of the server's CPU time for one token."""
        return self.usage.server_s / self.done.tokens * 1e6

    @property
    def server_us_per_message(self) -> float:
        """Microseconds of the server's CPU time for one request; of bare onnxruntime, for one run."""
        return self.usage.server_s / self.done.messages * 1e6

    @property
    def client_cores(self) -> float:
        """Cores that the load client used."""
        return self.usage.client_s / self.usage.elapsed_s

    @property
    def server_cores(self) -> float:
        """Cores that the server used."""
        return self.usage.server_s / self.usage.elapsed_s

    @property
    def foreign_cores(self) -> float:
        """Cores that neither of them used, but someone did."""
        return self.usage.foreign_s / self.usage.elapsed_s


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: times that each case runs.
        seconds: length of a segment.
        patience_s: for so long a segment may wait for a free machine, and be measured again when it was disturbed.
    """

    rounds: int
    seconds: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Rig:
    """Who takes part.

    Attributes:
        servers: process id of each target's server.
        load: who puts the load on.
        bare: bare onnxruntime, its own server and load.
        batches: runs of the model so far and the sessions in them, from the server's metrics.
    """

    servers: Mapping[Target, int]
    load: Worker
    bare: Worker
    batches: Callable[[], tuple[float, float]]

    def worker(self, case: Case) -> Worker:
        """Who runs the case."""
        return self.bare if case.target is Target.BARE else self.load


def measure_group(rig: Rig, group: Group, plan: Plan, told: Callable[[Segment], None]) -> list[Segment]:
    """Opens a group's cases, runs all of them in each of the rounds, and closes them; `told` hears of each segment.

    With patience, a segment that is void is followed by another of the same case and round, which counts in its place.

    Raises:
        WorkerError: the client was refused or got a wrong answer.
    """
    for case in group.cases:
        rig.worker(case).open(case)
    for case in group.cases:
        measure(rig, case, -1, min(_WARM_UP_S, plan.seconds))
    segments = []
    for round_ in range(plan.rounds):
        for case in group.cases:
            give_up_at = time.monotonic() + plan.patience_s
            while True:
                wait_until_free(give_up_at, rig.load.tend)
                segments.append(measure(rig, case, round_, plan.seconds * case.share))
                told(segments[-1])
                if not segments[-1].void or time.monotonic() >= give_up_at:
                    break
    for worker in (rig.load, rig.bare):
        worker.clear()
    return segments


def measure(rig: Rig, case: Case, round_: int, seconds: float) -> Segment:
    """Runs a case that is open for that long.

    Raises:
        WorkerError: the client was refused or got a wrong answer.
    """
    worker = rig.worker(case)
    runs_model = case.target in SERVED and case.target is not Target.ECHO
    runs, rows = rig.batches() if runs_model else (0.0, 0.0)
    meter = Meter(rig.servers[case.target], [] if case.client is Client.NONE else [worker.pid])
    done = worker.run(case, seconds)
    usage = meter.stop()
    mean_batch = float(case.sessions) if case.target is Target.BARE else 0.0
    if runs_model:
        runs_after, rows_after = rig.batches()
        mean_batch = (rows_after - rows) / max(1.0, runs_after - runs)
    figures = worker.figures()
    client_bound = usage.client_s > MAX_CLIENT_CORES * usage.elapsed_s
    # What the client's limit does to an echo is told beside its figures; nothing else is the server's with it.
    void = why_void(case, usage, figures)
    return Segment(case.name, round_, done, usage, figures, mean_batch, client_bound and not void, tuple(void))


def why_void(case: Case, usage: Usage, figures: Figures) -> list[str]:
    """Why such a segment does not count; empty: it does."""
    why = []
    if not figures.fewest:
        why.append("a session was not served")
    if figures.streams < case.streams:
        why.append(f"{case.streams - figures.streams} streams were not served")
    client, foreign = usage.client_s / usage.elapsed_s, usage.foreign_s / usage.elapsed_s
    # Of an echo the client may be the limit, and the SDK is itself what is measured.
    if client > MAX_CLIENT_CORES and case.target in {Target.NULL, Target.FULL} and case.client not in SDK:
        why.append(f"the client took {client:.2f} cores")
    if foreign > MAX_FOREIGN_CORES:
        why.append(f"others used {foreign:.2f} cores")
    return why


def wait_until_free(give_up_at: float, tend: Callable[[], None]) -> None:
    """Returns once the machine is idle, or at that time (monotonic). Nothing tells when it is, so this looks often."""
    tend()
    while time.monotonic() < give_up_at:
        began, (busy_s, _) = time.perf_counter(), machine_cpu_s()
        time.sleep(_LOOK_S)
        if machine_cpu_s()[0] - busy_s <= MAX_FOREIGN_CORES * (time.perf_counter() - began):
            return
        tend()
