"""What this protocol tells of its own work, beside what is counted for every model.

Invariant: every figure was counted; what was not measured is not told.
"""

import time
from dataclasses import dataclass

from conveyor_proto.inference import service_pb2 as pb

from conveyor_server.engine.engine import Engine
from conveyor_server.metrics import Metrics, ModelFigures, Tally


@dataclass(slots=True)
class Counts:
    """Of one model version: requests of this protocol. Core thread only.

    Attributes:
        reads, read_s: requests whose tensors were read, and seconds that it took.
        answers, answer_s: requests that were answered, and seconds from their arrival until they were.
        failures, failure_s: requests that were refused or failed, likewise.
        last_ms: Unix time of the last request that was answered, in milliseconds; 0: none was.
    """

    reads: int = 0
    read_s: float = 0.0
    answers: int = 0
    answer_s: float = 0.0
    failures: int = 0
    failure_s: float = 0.0
    last_ms: int = 0

    def read(self, took_s: float) -> None:
        """Tensors were read."""
        self.reads += 1
        self.read_s += took_s

    def answered(self, took_s: float) -> None:
        """A request was answered."""
        self.answers += 1
        self.answer_s += took_s
        self.last_ms = time.time_ns() // 1_000_000

    def failed(self, took_s: float) -> None:
        """A request was refused or failed."""
        self.failures += 1
        self.failure_s += took_s


class Statistics:
    """Counts for every model version that was asked for; outlives an unload. Core thread only.

    Args:
        metrics: what is counted for every model.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counts: dict[tuple[str, str], Counts] = {}

    def of(self, engine: Engine) -> Counts:
        """The counts of an engine's model version."""
        return self._counts.setdefault((engine.model, engine.version), Counts())

    def message(self, engine: Engine) -> pb.ModelStatistics:
        """The statistics of a model version: of all its steps, whatever protocol they came by."""
        figures, counts = self._metrics.of(engine), self.of(engine)
        queue, run, reply = (_sum(tally) for tally in (figures.queue, figures.run, figures.reply))
        success = _duration(figures.steps, figures.queue.total + figures.run.total + figures.reply.total)
        if not engine.spec.states:
            # A step is a row there, and a request has many.
            success = _duration(counts.answers, counts.answer_s)
        return pb.ModelStatistics(
            name=engine.model,
            version=engine.version,
            last_inference=counts.last_ms,
            inference_count=figures.steps,
            execution_count=sum(figures.batch_rows.counts),
            inference_stats=pb.InferStatistics(
                success=success,
                fail=_duration(counts.failures, counts.failure_s),
                queue=queue,
                compute_input=_duration(counts.reads, counts.read_s),
                compute_infer=run,
                compute_output=reply,
            ),
            batch_stats=_batches(figures),
            memory_usage=[
                pb.MemoryUsage(
                    type=engine.runner.device.upper(), id=0, byte_size=engine.spec.state_bytes * engine.slots.capacity
                )
            ],
        )


def _batches(figures: ModelFigures) -> list[pb.InferBatchStatistics]:
    return [
        pb.InferBatchStatistics(batch_size=rows, compute_infer=_duration(count, seconds))
        for rows, (count, seconds) in sorted(figures.runs_by_rows.items())
    ]


def _sum(tally: Tally) -> pb.StatisticDuration:
    return _duration(sum(tally.counts), tally.total)


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))
