"""One measured second of one case, and the rounds that they come in.

Invariant: in a round every case runs once, in the order of cases.py; a segment that something disturbed is kept, with
the reasons why it does not count.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.accounting import Meter, Usage, machine_cpu_s
from benchmarks.cases import Case, Client, Target
from benchmarks.figures import Done, Figures
from benchmarks.worker import Worker

# Share of one core that others may use while a segment counts.
MAX_FOREIGN_CORES = 0.10
# The load client is one process of Python: near one core, it is what is measured.
MAX_CLIENT_CORES = 0.80
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
        mean_batch: sessions in one run of the model, as the server's own metrics count; 0: the echo runs none.
        void: why the segment does not count; empty: it does.
    """

    case: str
    round: int
    done: Done
    usage: Usage
    figures: Figures
    mean_batch: float
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
        workers: of each target, who puts the load on; for bare onnxruntime the server itself.
        batches: runs of the model so far and the sessions in them, from the server's metrics.
    """

    servers: Mapping[Target, int]
    workers: Mapping[Target, Worker]
    batches: Callable[[], tuple[float, float]]


def measure(rig: Rig, case: Case, round_: int, seconds: float) -> Segment:
    """Runs a case for that long.

    Raises:
        WorkerError: the client was refused or got a wrong answer.
    """
    worker, server = rig.workers[case.target], rig.servers[case.target]
    runs, rows = rig.batches() if case.target is Target.CONVEYOR else (0.0, 0.0)
    meter = Meter(server, [] if case.client is Client.NONE else [worker.pid])
    done = worker.run(case, seconds)
    usage = meter.stop()
    mean_batch = float(case.sessions) if case.target is Target.BARE else 0.0
    if case.target is Target.CONVEYOR:
        runs_after, rows_after = rig.batches()
        mean_batch = (rows_after - rows) / max(1.0, runs_after - runs)
    figures = worker.figures()
    return Segment(case.name, round_, done, usage, figures, mean_batch, tuple(_why_void(usage, figures)))


def measure_rounds(rig: Rig, cases: Sequence[Case], plan: Plan, told: Callable[[Segment], None]) -> list[Segment]:
    """Runs all cases in each of the rounds; `told` hears of each segment as it ends.

    With patience, a segment that is void is followed by another of the same case and round, which counts in its place.
    """
    segments = []
    for round_ in range(plan.rounds):
        for case in cases:
            give_up_at = time.monotonic() + plan.patience_s
            while True:
                wait_until_free(give_up_at)
                segments.append(measure(rig, case, round_, plan.seconds))
                told(segments[-1])
                if not segments[-1].void or time.monotonic() >= give_up_at:
                    break
    return segments


def wait_until_free(give_up_at: float) -> None:
    """Returns once the machine is idle, or at that time (monotonic). Nothing tells when it is, so this looks often."""
    while time.monotonic() < give_up_at:
        began, (busy_s, _) = time.perf_counter(), machine_cpu_s()
        time.sleep(_LOOK_S)
        if machine_cpu_s()[0] - busy_s <= MAX_FOREIGN_CORES * (time.perf_counter() - began):
            return


def _why_void(usage: Usage, figures: Figures) -> list[str]:
    why = []
    if not figures.fewest:
        why.append("a session was not served")
    foreign = usage.foreign_s / usage.elapsed_s
    if foreign > MAX_FOREIGN_CORES:
        why.append(f"others used {foreign:.2f} cores")
    return why
