"""Steps that nothing is before: accepted, run, recorded and told within one call, without a flight.

Invariant: either all members of an offer go, and then everything is as if they had flown; or none does, nothing has
moved, and the offer is to be made (Flights), which judges each of its members. Most turns of a server that keeps up go
this way, and what it costs is mostly how much code it is: whatever lies unused for some hundred microseconds has left
the processor's caches.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.codec import Array

from conveyor_server.engine.engine import Engine
from conveyor_server.sessions.events import Attachment
from conveyor_server.sessions.flight import Offer, apply
from conveyor_server.sessions.record import Recorded
from conveyor_server.sessions.session import Submission
from conveyor_server.sessions.table import (
    AHEAD,
    APPLIED_SEQ,
    APPLIED_TIME_STEPS,
    CREDIT,
    FAILED_SEQ,
    GATE,
    LAST_USED_AT,
    SessionTable,
)

if TYPE_CHECKING:
    from conveyor_server.compiled import Staging, Turn


def run_now(table: SessionTable, offer: Offer, now: float) -> Sequence[Array] | None:
    """Runs an offer at once, which fits (Engine.fits).

    Args:
        table: the sessions.
        offer: what is to be run.
        now: seconds of the driver's clock.

    Returns:
        The outputs of all members, as of Sink.landed; None: a member is not its session's next step, or a run or a
        state failed, and nothing has happened.
    """
    cells = table.look(offer.where)
    ready = cells[:, GATE] == offer.holders
    ready &= cells[:, APPLIED_SEQ] == offer.seqs - 1
    ready &= cells[:, AHEAD] == 0
    ready &= cells[:, CREDIT] >= offer.train
    if np.count_nonzero(ready) < len(ready) or not offer.distinct:
        return None
    outputs = offer.engine.run_now(offer.where, offer.inputs, offer.length)
    if outputs is None:
        return None
    cells[:, FAILED_SEQ] = 0
    cells.view(np.float64)[:, LAST_USED_AT] = now
    if offer.acked_seqs is not None:
        offer.record.acknowledge(cells, offer.acked_seqs)
    apply(offer, offer.where, cells, seqs=offer.seqs, prints=offer.prints, outputs=outputs)
    if offer.acked_seqs is not None:
        # What was applied only now cannot have been acknowledged yet.
        offer.record.trim(offer.where, np.minimum(offer.acked_seqs, offer.seqs - 1))
    return outputs


def run_turn(turn: "Turn", now: float) -> "Staging | None":
    """`run_now` for what the compiled part has read; it fits.

    Returns:
        The buffers in which the outputs lie until the model's next run; None: nothing has happened.
    """
    if turn.model is None:
        return None
    engine: Engine = turn.model.engine
    staging = engine.staging(turn.rows)
    if staging is None or not turn.fill(staging) or not engine.run_staged(staging) or not turn.commit(staging, now):
        return None
    return staging


def run_one_now(seat: Attachment, step: Submission, now: float) -> Sequence[Array] | None:
    """`run_now` for one step of the session that a stream holds.

    Args:
        seat: whose step it is.
        step: valid; it fits into one run.
        now: seconds of the driver's clock.

    Returns:
        The outputs, `[time, *shape]`, or `[*shape]` without time; None: nothing has happened.
    """
    session = seat.session
    table, row = session.table, session.row
    cells = table.cells[row]
    if session.attachment is not seat or cells[GATE] != seat.number:
        return None
    if cells[APPLIED_SEQ] != step.seq - 1 or cells[AHEAD]:
        return None
    outputs = session.engine.run_one_now(session.lane, step.inputs, step.length)
    if outputs is None:
        return None
    if step.acked_seq:
        session.answers.forget(min(step.acked_seq, session.applied_seq))
    session.answers.add(Recorded(step.seq, step.fingerprint, step.length, outputs))
    cells[APPLIED_SEQ] = step.seq
    cells[APPLIED_TIME_STEPS] += step.length
    cells[FAILED_SEQ] = 0
    table.last_used_at[row] = now
    return outputs
