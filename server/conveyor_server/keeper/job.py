"""One visit to the store: everything that waits for it, in as few round trips as there are kinds of things.

Invariants: at most one job is out, so that what the core knows is what the store knew at the end of the last one;
writes come first, so that whoever is let in sees what was there before. What a job could not do is asked for again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from conveyor_server.incidents import record
from conveyor_server.keeper.body import Piece, encode
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import (
    Checkpoint,
    Claim,
    Claimed,
    Created,
    Creation,
    Found,
    Outcome,
    StateStore,
    StoreUnavailable,
)


@dataclass(slots=True)
class Save:
    """Sessions that are written, as of one moment.

    Attributes:
        sessions: which.
        rows: of the session table, then.
        epochs: of the sessions, then.
        expires: unix seconds, of each.
        piece: their states and answers.
        heads: by position, of those that are of another version of their model from now on.
    """

    sessions: list[Session]
    rows: NDArray[np.int64]
    epochs: list[int]
    expires: list[float]
    piece: Piece
    heads: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Job:
    """What the store is asked for. Made and read by the core thread, run by the store's.

    Attributes:
        number: counts jobs.
        owner, runtime: see Checkpoint.
        saves, deletes, creations, claims, wanted: see StateStore.
        sweep: unix seconds: what has expired by then goes; 0: nothing.
        error: why it ended early.
        saved, deleted, created, claimed, found: the answers, of what was done.
        took_s: seconds, of all of it.
        written_bytes: of bodies.
    """

    number: int
    owner: str
    runtime: str
    saves: list[Save] = field(default_factory=list)
    deletes: list[tuple[Session, int]] = field(default_factory=list)
    creations: list[Creation] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    wanted: list[tuple[str, int]] = field(default_factory=list)
    sweep: float = 0.0
    error: StoreUnavailable | None = None
    saved: Sequence[Outcome] | None = None
    deleted: Sequence[Outcome] | None = None
    created: Sequence[Created] | None = None
    claimed: Sequence[Claimed] | None = None
    found: Sequence[Found] | None = None
    swept: int = 0
    took_s: float = 0.0
    written_bytes: int = 0

    def __bool__(self) -> bool:
        """There is something to do."""
        asks = self.creations or self.claims or self.wanted
        return bool(self.saves or self.deletes or asks or self.sweep)

    def run(self, store: StateStore) -> None:
        """Does it, as far as the store can. The store's thread."""
        began = time.perf_counter()
        try:
            self._run(store)
        except StoreUnavailable as error:
            self.error = error
        except Exception as error:  # a defect of ours or of the store's: sessions wait for it, and nobody's are lost
            self.error = StoreUnavailable(f"it failed unexpectedly, see incident {record('the store failed', error)}")
        self.took_s = time.perf_counter() - began

    def _run(self, store: StateStore) -> None:
        if self.saves:
            self.saved = store.put(self._checkpoint())
        if self.deletes:
            self.deleted = store.delete([(session.id, epoch) for session, epoch in self.deletes])
        if self.creations:
            self.created = store.create(self.creations)
        if self.claims:
            self.claimed = store.take(self.claims)
        if self.wanted:
            self.found = store.load(self.wanted)
        if self.sweep:
            self.swept = store.sweep(self.sweep)

    def _checkpoint(self) -> Checkpoint:
        bodies: list[bytes] = []
        checkpoint = Checkpoint([], [], [], [], b"", [], self.owner, self.runtime)
        for save in self.saves:
            data, size = encode(save.piece)
            bodies.append(data)
            count = len(save.sessions)
            before = len(checkpoint.session_ids)
            checkpoint.heads |= {before + index: head for index, head in save.heads.items()}
            checkpoint.session_ids += [session.id for session in save.sessions]
            checkpoint.epochs += save.epochs
            checkpoint.seqs += save.piece.seqs.tolist()
            checkpoint.expires += save.expires
            checkpoint.sizes += [size] * count
        checkpoint.bodies = bodies[0] if len(bodies) == 1 else b"".join(bodies)
        self.written_bytes = len(checkpoint.bodies)
        return checkpoint
