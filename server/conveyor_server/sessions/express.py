"""Steps that nothing is before: accepted, run, recorded and told within one call, without a flight.

Invariant: either all members of an offer go, and then everything is as if they had flown; or none does, nothing has
moved, and the offer is to be made (Flights), which judges each of its members. Most turns of a server that keeps up go
this way, and what it costs is mostly how much code it is: whatever lies unused for some hundred microseconds has left
the processor's caches.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array

from conveyor_server.sessions.flight import Offer, apply
from conveyor_server.sessions.table import AHEAD, APPLIED_SEQ, CREDIT, FAILED_SEQ, GATE, LAST_USED_AT, SessionTable


def run_now(table: SessionTable, offer: Offer, now: float) -> Sequence[Array] | None:
    """Runs an offer at once; the engine has nothing to run.

    Args:
        table: the sessions.
        offer: its members fit into one run.
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
