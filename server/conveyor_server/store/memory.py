"""A store in memory: nothing outlives the process. The contract in its plainest form, which the others are held to."""

import time
from collections.abc import Callable, Sequence

from conveyor_server.identity.caller import prefix
from conveyor_server.store.contract import (
    Behind,
    Checkpoint,
    Claim,
    Claimed,
    Created,
    Creation,
    Exists,
    Fenced,
    Found,
    Missing,
    Outcome,
    Page,
    Quota,
    QuotaFull,
    Record,
    milliseconds,
    not_too_late,
)


class MemoryStore:
    """See contract.StateStore.

    Args:
        clock: unix seconds.
    """

    name = "memory"
    shared = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._models: dict[str, str] = {}
        self._keys: dict[str, Sequence[str]] = {}

    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """See StateStore."""
        return [self._create(creation) for creation in creations]

    def take(self, claims: Sequence[Claim]) -> list[Claimed]:
        """See StateStore."""
        not_too_late(claims)
        return [self._take(claim) for claim in claims]

    def load(self, wanted: Sequence[tuple[str, int]]) -> list[Found]:
        """See StateStore."""
        found: list[Found] = []
        for session_id, epoch in wanted:
            record = self._find(session_id)
            if record is None:
                found.append(Missing())
            else:
                found.append(record if epoch in {0, record.epoch} else Fenced(record.epoch))
        return found

    def put(self, checkpoint: Checkpoint) -> list[Outcome]:
        """See StateStore."""
        outcomes, at = [], 0
        for index, (session_id, size) in enumerate(zip(checkpoint.session_ids, checkpoint.sizes, strict=True)):
            body, at = checkpoint.bodies[at : at + size], at + size
            outcomes.append(self._put(checkpoint, index, session_id, body))
        return outcomes

    def delete(self, sessions: Sequence[tuple[str, int]]) -> list[Outcome]:
        """See StateStore."""
        outcomes = []
        for session_id, epoch in sessions:
            record = self._find(session_id)
            if record is None:
                outcomes.append(Outcome.MISSING)
            elif record.epoch != epoch:
                outcomes.append(Outcome.FENCED)
            else:
                self._remove(session_id)
                outcomes.append(Outcome.DONE)
        return outcomes

    def listed(self, after: str, limit: int, model: str, tenant: str = "") -> Page:
        """See StateStore."""
        now = self._clock()
        ids = sorted(
            session_id
            for session_id, record in self._records.items()
            if record.expires_at > now
            and model in {"", self._models[session_id]}
            and session_id.startswith(prefix(tenant))
        )
        behind = [session_id for session_id in ids if session_id > after]
        records = [self._records[session_id]._replace(body=b"") for session_id in behind[:limit]]
        return Page(records, more=len(behind) > limit, total=len(ids))

    def count(self) -> int:
        """See StateStore."""
        return self.listed("", 0, "").total

    def sweep(self, now: float) -> int:
        """See StateStore."""
        gone = [session_id for session_id, record in self._records.items() if record.expires_at <= now]
        for session_id in gone:
            self._remove(session_id)
        return len(gone)

    def close(self) -> None:
        """See StateStore."""

    def _find(self, session_id: str) -> Record | None:
        record = self._records.get(session_id)
        if record is not None and record.expires_at <= self._clock():
            self._remove(session_id)
            return None
        return record

    def _create(self, new: Creation) -> Created:
        known = self._find(new.session_id)
        if known is not None:
            ours = known.epoch == new.epoch and known.owner == new.owner and known.head == new.head
            return None if ours else Exists()
        full = self._full(new.quotas)
        if full is not None:
            return QuotaFull(full)
        self._records[new.session_id] = Record(
            new.session_id, new.epoch, new.seq, new.head, new.body, new.owner, new.runtime, _kept(new.expires_at)
        )
        self._models[new.session_id] = new.model
        self._keys[new.session_id] = new.counted_as()
        return None

    def _full(self, quotas: Sequence[Quota]) -> Quota | None:
        bounds = [quota for quota in quotas if quota.most]
        if bounds:
            self.sweep(self._clock())
        for quota in bounds:
            if sum(quota.key in keys for keys in self._keys.values()) >= quota.most:
                return quota
        return None

    def _take(self, claim: Claim) -> Claimed:
        record = self._find(claim.session_id)
        if record is None:
            return Missing()
        if claim.max_epoch and record.epoch > claim.max_epoch:
            return Fenced(record.epoch)
        if record.seq < claim.min_seq:
            return Behind(record.seq)
        taken = record._replace(epoch=record.epoch + 1, owner=claim.owner, expires_at=_kept(claim.expires_at))
        self._records[claim.session_id] = taken
        return taken._replace(body=b"") if record.epoch == claim.known_epoch else taken

    def _put(self, checkpoint: Checkpoint, index: int, session_id: str, body: bytes) -> Outcome:
        record = self._find(session_id)
        if record is None:
            return Outcome.MISSING
        if record.epoch != checkpoint.epochs[index]:
            return Outcome.FENCED
        seq, head = checkpoint.seqs[index], checkpoint.heads.get(index)
        if seq > record.seq or (seq == record.seq and head is not None):
            self._records[session_id] = record._replace(
                seq=seq,
                body=body,
                head=record.head if head is None else head,
                owner=checkpoint.owner,
                runtime=checkpoint.runtime,
                expires_at=_kept(checkpoint.expires[index]),
            )
        return Outcome.DONE

    def _remove(self, session_id: str) -> None:
        del self._records[session_id], self._models[session_id], self._keys[session_id]


def _kept(moment: float) -> float:
    return milliseconds(moment) / 1000
