"""Parked members of several flights that come free together go on as one flight.

Invariant: a member is in one flight from then on, the new one, and is answered by it where the old one would have been;
nothing else about its session changes. So however small the messages are that steps came in, what runs together and
what is answered together is as large as it can be.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conveyor_server.sessions.flight import Flight, Offer

# Members of a flight that are to go on.
Piece: TypeAlias = tuple[Flight, NDArray[np.int64]]


def regroup(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces that can go on as one, together; all in their order."""
    groups: dict[object, list[Piece]] = {}
    for flight, members in pieces:
        groups.setdefault(_kind(flight), []).append((flight, members))
    return list(groups.values())


def joined(pieces: Sequence[Piece]) -> Flight:
    """A flight of all the members of a group. Their old flights have handed them over."""
    first = pieces[0][0]
    offers = [flight.offer for flight, _ in pieces]
    chosen = [members for _, members in pieces]
    rows = np.concatenate([offer.rows[members] for offer, members in zip(offers, chosen, strict=True)])
    inputs = [
        np.concatenate([offer.inputs[index][members] for offer, members in zip(offers, chosen, strict=True)])
        for index in range(len(first.offer.inputs))
    ]
    offer = Offer(
        engine=first.offer.engine,
        record=first.offer.record,
        rows=rows,
        where=rows,
        seqs=np.concatenate([offer.seqs[members] for offer, members in zip(offers, chosen, strict=True)]),
        acked_seqs=None,
        holders=np.concatenate([offer.holders[members] for offer, members in zip(offers, chosen, strict=True)]),
        prints=np.concatenate([offer.prints[members] for offer, members in zip(offers, chosen, strict=True)]),
        inputs=inputs,
        length=first.offer.length,
        train=first.offer.train,
        distinct=True,
        timeout_s=first.offer.timeout_s,
        sink=first.offer.sink.joined([(offer.sink, members) for offer, members in zip(offers, chosen, strict=True)]),
    )
    for flight, members in pieces:
        flight.hand_over(len(members))
    # None is taken for too late that is not; and none of them waits much longer.
    deadline = max(flight.deadline for flight, _ in pieces)
    made = Flight(first.table, offer, min(flight.submitted_at for flight, _ in pieces), deadline, first.watch)
    made.adopt()
    return made


def _kind(flight: Flight) -> object:
    """Equal for flights whose members can go on as one."""
    offer = flight.offer
    return offer.engine, offer.record, offer.length, offer.train, offer.sink.kind
