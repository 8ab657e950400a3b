"""Which steps of a run are traced, and what is known of them by then.

Invariant: a run asks the sampler once. What the spans of a step need is looked up for those alone that were chosen, and
they are made once what the run answered is on its way.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from conveyor_server.engine.batch import Batch
from conveyor_server.engine.cohort import Cohort
from conveyor_server.engine.engine import Engine
from conveyor_server.engine.step import Step
from conveyor_server.servicers.core import trace_of
from conveyor_server.sessions.events import Attachment
from conveyor_server.sessions.flight import Flight, Offer
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import SessionTable
from conveyor_server.tracing import CallTrace, StepTimes, TracedStep, Tracing

if TYPE_CHECKING:
    from conveyor_server.compiled import Turn


# Of a run at once: its steps were taken, were recorded, and their answers were with the transport.
Moments: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A step of a batch that is out, which is to be traced once it is back.

    Attributes:
        trace: of the call that sent it.
        session_id, seq: which step it is.
        part: what it is in the batch.
        member: of the cohort, if it is one.
    """

    trace: CallTrace
    session_id: str
    seq: int
    part: Step | Cohort
    member: int = 0


class StepTraces:
    """Of one driver. Core thread only.

    Args:
        tracing: chooses, and takes what was chosen.
        table: the sessions.
        now: the driver's clock.
    """

    def __init__(self, tracing: Tracing, table: SessionTable, now: Callable[[], float]) -> None:
        self.tracing = tracing
        self._steps = tracing.steps
        self._table = table
        self._now = now
        self._made: list[tuple[CallTrace, TracedStep]] = []

    # ------------------------------------------------------------ runs at once

    def offer_ran(self, offer: Offer, at: Moments) -> bool:
        """An offer was run; whether there is something to `tell`."""
        for index in self._steps.take(len(offer.rows) * offer.train):
            member, turn = divmod(index, offer.train)
            trace = _recorded(offer.sink.reply_to(member))
            if trace is not None:
                seq, rows = int(offer.seqs[member]) + turn, len(offer.rows)
                session = self._session(int(offer.rows[member]))
                self._ran(trace, session, at, seq=seq, length=offer.length // offer.train, rows=rows)
        return bool(self._made)

    def one_ran(self, seat: Attachment, seq: int, length: int, at: Moments) -> bool:
        """A step was run alone; as `offer_ran`."""
        if self._steps.take(1) and (trace := _recorded(seat.owner)) is not None:
            self._ran(trace, seat.session, at, seq=seq, length=length, rows=1)
        return bool(self._made)

    def turn_ran(self, turn: "Turn", at: Moments) -> bool:
        """A turn was run by the compiled part; as `offer_ran`."""
        for index in self._steps.take(turn.rows):
            row, seq = turn.where(index)
            session = self._session(row)
            trace = None if session.attachment is None else _recorded(session.attachment.owner)
            if trace is not None:
                self._ran(trace, session, at, seq=seq, length=1, rows=turn.rows)
        return bool(self._made)

    # ------------------------------------------------------------ batches

    def choose(self, batch: Batch) -> Sequence[Chosen]:
        """The steps that are traced of those that this batch is to finish. Before it is delivered."""
        count = len(batch.steps)
        for cohort in batch.cohorts:
            count += len(cohort.members) * cohort.train
        indices = self._steps.take(count)
        return [one for index in indices if (one := _find(batch, index)) is not None] if indices else ()

    def batch_ran(self, engine: Engine, chosen: Sequence[Chosen], batch: Batch, now: float, told: float) -> bool:
        """The batch was delivered at `now`, and its answers were told; as `offer_ran`."""
        for one in chosen:
            part: Step | Cohort | None = one.part
            if isinstance(part, Cohort) and one.member not in part.members:
                # It left the cohort while it ran.
                part = part.claimed.get(one.member)
            if part is None or (isinstance(part, Step) and part.finished_at != now):
                # The run failed, and it is run again without some of the others.
                continue
            ran_from, ran_to = self._model_ran(batch.ran_from, batch.run_s, part.started_at, now)
            fault = part.fault if isinstance(part, Step) else None
            step = TracedStep(
                engine.model,
                engine.version,
                one.session_id,
                one.seq,
                part.length // part.train,
                batch.rows,
                StepTimes(part.submitted_at, part.started_at, ran_from, ran_to, now, told),
                "" if fault is None else fault.reason_name,
            )
            self._made.append((one.trace, step))
        return bool(self._made)

    def tell(self) -> None:
        """Has the spans made."""
        made, self._made = self._made, []
        for trace, step in made:
            trace.step(step)

    # ------------------------------------------------------------ within

    def _ran(self, trace: CallTrace, session: Session, at: Moments, *, seq: int, length: int, rows: int) -> None:
        engine = session.engine
        began, ran, told = at
        ran_from, ran_to = self._model_ran(engine.ran_from, engine.ran_s, began, ran)
        times = StepTimes(began, began, ran_from, ran_to, ran, told)
        self._made.append((trace, TracedStep(engine.model, engine.version, session.id, seq, length, rows, times)))

    def _model_ran(self, ran_from: float, run_s: float, earliest: float, latest: float) -> tuple[float, float]:
        """When a model began and ended, on the driver's clock: runs are timed by another."""
        began = max(earliest, ran_from + (self._now() - time.perf_counter()))
        return began, max(began, min(latest, began + run_s))

    def _session(self, row: int) -> Session:
        session = self._table.sessions[row]
        if session is None:
            raise AssertionError("a session that has just run is gone")
        return session


def _recorded(address: object) -> CallTrace | None:
    trace = trace_of(address)
    return trace if trace is not None and trace.recorded else None


def _find(batch: Batch, index: int) -> Chosen | None:
    """The step at that place of a batch; None: it goes on in another batch, or no traced call waits for it."""
    for cohort in batch.cohorts:
        count = len(cohort.members) * cohort.train
        if index < count:
            return _of_cohort(cohort, *divmod(index, cohort.train))
        index -= count
    step = batch.steps[index]
    session: Session = step.context
    # The only one of its session's steps that can be in a run.
    head = session.own_pending[0]
    trace = _recorded(head.waiters[0]) if head.waiters else None
    if trace is None or batch.shares[index] < step.remaining:
        return None
    return Chosen(trace, session.id, head.seq, step)


def _of_cohort(cohort: Cohort, place: int, turn: int) -> Chosen | None:
    flight = cohort.owner
    if not isinstance(flight, Flight):
        return None
    offer, member = flight.offer, int(cohort.members[place])
    trace = _recorded(offer.sink.reply_to(member))
    session = flight.table.sessions[int(offer.rows[member])]
    if trace is None or session is None:
        return None
    return Chosen(trace, session.id, int(offer.seqs[member]) + turn, cohort, member)
