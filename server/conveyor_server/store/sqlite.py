"""A store in one SQLite file: embedded, nothing to run beside it; several processes of one machine may share it.

Invariants: each call is one transaction, and one that writes is the only one that does; what a call says and is told of
all its sessions passes in a handful of values, so that it is a handful of statements however many sessions there are,
each of which does its work without the interpreter's lock: the core thread goes on meanwhile. (A statement or a row for
each session would ask for the lock thousands of times a second, and wait for it each time.)
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conveyor_server.identity.caller import bounds
from conveyor_server.store import sqlite_statements as sql
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
    QuotaFull,
    Record,
    milliseconds,
    not_too_late,
)
from conveyor_server.store.sqlite_file import Synchronous, open_file, patient

_SWEPT = 5000
# What one call that needs the place of the dead sweeps at most, in units of _SWEPT.
_ROUNDS = 4
# Of bodies in one value; the longest that SQLite takes is 1,000,000,000.
_MOST_BYTES = 1 << 28


class SqliteStore:
    """See contract.StateStore.

    Args:
        path: of the file, made where there is none.
        synchronous: full, a write is on the disk when it is told; normal, it outlives the process but not the machine.
        timeout_s: how long another process may keep the file locked.
        clock: unix seconds.

    Raises:
        StoreInvalid: the file is none of ours, or cannot be opened.
        StoreUnavailable: another process keeps it locked.
    """

    shared = True

    def __init__(
        self,
        path: Path,
        *,
        synchronous: Synchronous = "full",
        timeout_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = f"sqlite:{path}"
        self._clock = clock
        self.timeout_s = timeout_s
        self._db = open_file(path, synchronous)

    @patient
    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """See StateStore."""
        with self._transaction() as now:
            known = self._look([new.session_id for new in creations], now)
            used = self._used({quota.key for new in creations for quota in new.quotas if quota.most}, now)
            answers: list[Created] = []
            added = []
            for new in creations:
                answer = _created(new, known.get(new.session_id), used)
                answers.append(answer)
                if answer is None and new.session_id not in known:
                    added.append(new)
                    if milliseconds(new.expires_at) > now:
                        used.update((key, used.get(key, 0) + 1) for key in new.counted_as())
            if added:
                self._add(added, now)
        return answers

    @patient
    def take(self, claims: Sequence[Claim]) -> list[Claimed]:
        """See StateStore."""
        with self._transaction() as now:
            not_too_late(claims)
            known = self._look([claim.session_id for claim in claims], now)
            taken, bodies = [], []
            answers: list[Claimed] = []
            for claim in claims:
                number, record = known.get(claim.session_id, _NONE)
                answer = _claimed(claim, record)
                answers.append(answer)
                if isinstance(answer, Record):
                    taken.append((number, claim.owner, milliseconds(claim.expires_at)))
                    if answer.epoch - 1 != claim.known_epoch:
                        bodies.append(number)
            if taken:
                self._execute(sql.TAKE, claims=json.dumps(taken))
            found = self._bodies(bodies)
        return [
            answer._replace(body=found.get(known[answer.session_id][0], b"")) if isinstance(answer, Record) else answer
            for answer in answers
        ]

    @patient
    def load(self, wanted: Sequence[tuple[str, int]]) -> list[Found]:
        """See StateStore."""
        with self._transaction("DEFERRED") as now:
            known = self._look([session_id for session_id, _ in wanted], now)
            found = [(known.get(session_id, _NONE), epoch) for session_id, epoch in wanted]
            bodies = self._bodies([number for (number, record), epoch in found if record and _theirs(record, epoch)])
        answers: list[Found] = []
        for (number, record), epoch in found:
            if record is None:
                answers.append(Missing())
            elif _theirs(record, epoch):
                answers.append(record._replace(body=bodies[number]))
            else:
                answers.append(Fenced(record.epoch))
        return answers

    @patient
    def put(self, checkpoint: Checkpoint) -> list[Outcome]:
        """See StateStore."""
        outcomes: list[Outcome] = []
        with self._transaction() as now:
            for part in checkpoint.parts(_MOST_BYTES):
                outcomes += self._put(part, now)
        return outcomes

    @patient
    def delete(self, sessions: Sequence[tuple[str, int]]) -> list[Outcome]:
        """See StateStore."""
        outcomes, gone = [], []
        with self._transaction() as now:
            known = self._look([session_id for session_id, _ in sessions], now)
            for session_id, epoch in sessions:
                number, record = known.get(session_id, _NONE)
                if record is None:
                    outcomes.append(Outcome.MISSING)
                elif record.epoch != epoch:
                    outcomes.append(Outcome.FENCED)
                else:
                    gone.append(number)
                    outcomes.append(Outcome.DONE)
            self._execute(sql.DELETE, numbers=json.dumps(gone))
        return outcomes

    @patient
    def listed(self, after: str, limit: int, model: str, tenant: str = "") -> Page:
        """See StateStore."""
        with self._transaction("DEFERRED") as now:
            select = sql.LISTED_OF_MODEL if model else sql.LISTED
            first, behind = bounds(tenant)
            row = self._row(select, after=max(after, first), behind=behind, limit=limit + 1, model=model, now=now)
            if tenant:
                total = int(self._row(sql.COUNTED_OF_TENANT, first=first, behind=behind, model=model, now=now)[0])
            else:
                total = self._counted(model, now)
        records = [record for _, record in _records(row)]
        return Page(records[:limit], more=len(records) > limit, total=total)

    @patient
    def count(self) -> int:
        """See StateStore."""
        with self._transaction("DEFERRED") as now:
            return self._counted("", now)

    @patient
    def sweep(self, now: float) -> int:
        """See StateStore."""
        with self._transaction():
            return self._sweep(milliseconds(now))

    def close(self) -> None:
        """See StateStore."""
        self._db.close()

    # ------------------------------------------------------------ within

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[int]:
        """One transaction, at a moment. Where something is raised, nothing of it is done."""
        self._db.execute(f"BEGIN {kind}")
        try:
            yield milliseconds(self._clock())
            self._db.execute("COMMIT")
        except BaseException:
            # Some errors have ended it already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _execute(self, statement: str, **values: object) -> int:
        """Returns how many rows it has changed."""
        return self._db.execute(statement, values).rowcount

    def _row(self, statement: str, **values: object) -> Any:
        return self._db.execute(statement, values).fetchone()

    def _look(self, session_ids: Sequence[str], now: int) -> dict[str, tuple[int, Record]]:
        """Records that are there, without bodies, and the numbers that they are found by."""
        row = self._row(sql.LOOK, ids=json.dumps(session_ids), now=now)
        return {record.session_id: (number, record) for number, record in _records(row)}

    def _bodies(self, numbers: Sequence[int]) -> dict[int, bytes]:
        if not numbers:
            return {}
        try:
            sizes, data = self._row(sql.BODIES, numbers=json.dumps(numbers))
        except sqlite3.DataError:
            # More than one value can hold.
            if len(numbers) == 1:
                raise
            half = len(numbers) // 2
            return self._bodies(numbers[:half]) | self._bodies(numbers[half:])
        found, at = {}, 0
        for number, size in json.loads(sizes):
            found[number] = data[at : at + size]
            at += size
        return found

    def _put(self, checkpoint: Checkpoint, now: int) -> list[Outcome]:
        rows: list[tuple[object, ...]] = []
        columns = (checkpoint.session_ids, checkpoint.epochs, checkpoint.seqs, checkpoint.expires, checkpoint.sizes)
        at = 0
        for session_id, epoch, seq, expires, size in zip(*columns, strict=True):
            rows.append((session_id, epoch, seq, milliseconds(expires), at, size))
            at += size
        heads = b"".join(checkpoint.heads.values())
        at = 0
        for index, head in checkpoint.heads.items():
            rows[index] += (at, len(head))
            at += len(head)
        self._execute("DELETE FROM batch")
        self._execute(sql.FILL, batch=json.dumps(rows), now=now)
        written = self._execute(sql.PUT_SESSIONS, owner=checkpoint.owner, runtime=checkpoint.runtime)
        self._execute(sql.PUT_BODIES, bodies=checkpoint.bodies)
        self._execute(sql.PUT_DUE)
        if checkpoint.heads:
            self._execute(sql.PUT_HEADS, heads=heads)
        outcomes = [Outcome.DONE] * len(rows)
        if written < len(rows):
            (told,) = self._row(sql.REFUSED)
            for position, outcome in json.loads(told):
                outcomes[position] = Outcome(outcome)
        return outcomes

    def _used(self, keys: set[str], now: int) -> dict[str, int]:
        """How many records count against each quota."""
        if not keys:
            return {}
        for _ in range(_ROUNDS):
            if self._sweep(now) < _SWEPT:
                break
        (counts,) = self._row(sql.QUOTAS, keys=json.dumps(sorted(keys)))
        return dict(json.loads(counts))

    def _add(self, added: Sequence[Creation], now: int) -> None:
        rows, head_at, body_at = [], 0, 0
        for new in added:
            place = (head_at, len(new.head), body_at, len(new.body), new.epoch)
            expires = milliseconds(new.expires_at)
            rows.append((new.session_id, new.model, new.seq, new.owner, new.runtime, expires, new.counted_as(), *place))
            head_at, body_at = head_at + len(new.head), body_at + len(new.body)
        text = json.dumps(rows)
        # Those that have expired and were not swept make place.
        self._execute(sql.DELETE_DEAD, ids=json.dumps([new.session_id for new in added]), now=now)
        self._execute(sql.CREATE, new=text, heads=b"".join(new.head for new in added))
        self._execute(sql.CREATE_BODIES, new=text, bodies=b"".join(new.body for new in added))

    def _sweep(self, now: int) -> int:
        self._execute(sql.SWEEP_ON, now=now, most=_SWEPT)
        return self._execute(sql.SWEEP, now=now, most=_SWEPT)

    def _counted(self, model: str, now: int) -> int:
        row = self._row(sql.COUNTED, key=f"model:{model}" if model else "", model=model, now=now)
        return int(row[0])


_NONE: tuple[int, None] = (0, None)


def _records(row: tuple[str, bytes | None]) -> Iterator[tuple[int, Record]]:
    """The numbers and records of a row that sql.LOOK has made of them."""
    fields, heads = row
    at = 0
    for session_id, number, epoch, seq, owner, runtime, expires, size in json.loads(fields):
        head = heads[at : at + size] if heads else b""
        at += size
        yield number, Record(session_id, epoch, seq, head, b"", owner, runtime, expires / 1000)


def _theirs(record: Record, epoch: int) -> bool:
    return epoch in {0, record.epoch}


def _created(new: Creation, known: tuple[int, Record] | None, used: dict[str, int]) -> Created:
    if known is not None:
        record = known[1]
        ours = record.epoch == new.epoch and record.owner == new.owner and record.head == new.head
        return None if ours else Exists()
    for quota in new.quotas:
        if quota.most and used.get(quota.key, 0) >= quota.most:
            return QuotaFull(quota)
    return None


def _claimed(claim: Claim, record: Record | None) -> Claimed:
    if record is None:
        return Missing()
    if claim.max_epoch and record.epoch > claim.max_epoch:
        return Fenced(record.epoch)
    if record.seq < claim.min_seq:
        return Behind(record.seq)
    expires_at = milliseconds(claim.expires_at) / 1000
    return record._replace(epoch=record.epoch + 1, owner=claim.owner, expires_at=expires_at)
