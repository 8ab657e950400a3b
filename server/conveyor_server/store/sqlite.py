"""A store in one SQLite file: embedded, nothing to run beside it; several processes of one machine may share it.

Invariants: each call is one transaction, begun so that it is the only writer; a checkpoint is a handful of statements
however many sessions it has, each of which does its work without the interpreter's lock, so that the core thread goes on
meanwhile (a statement for each session would ask for the lock thousands of times a second, and wait for it each time).
"""

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
    StoreInvalid,
    StoreUnavailable,
)

Synchronous: TypeAlias = Literal["full", "normal"]
_SCHEMA = 1
# Bodies lie apart from what a fence looks at, so that looking reads few pages; and the numbers that join the two are
# what the writes of a batch are found by.
_TABLES = """
CREATE TABLE session (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    owner TEXT NOT NULL,
    runtime TEXT NOT NULL,
    expires_at REAL NOT NULL,
    head BLOB NOT NULL,
    quotas TEXT NOT NULL
) STRICT;
CREATE INDEX session_expires ON session (expires_at);
CREATE INDEX session_model ON session (model, id);
CREATE TABLE body (number INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE quota (key TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
_SWEEP = 5000
_COLUMNS = "s.id, s.epoch, s.seq, s.head, s.owner, s.runtime, s.expires_at"
# Of a batch: [[id, epoch, seq, expires, offset, size], ...]; `position` is its place there.
_BATCH = """
CREATE TEMP TABLE batch (
    position INTEGER PRIMARY KEY, number INTEGER, epoch INTEGER, seq INTEGER, expires REAL, at INTEGER, size INTEGER,
    outcome INTEGER NOT NULL
)
"""
_FILL = """
INSERT INTO batch
SELECT j.key, s.number, j.value ->> 1, j.value ->> 2, j.value ->> 3, j.value ->> 4, j.value ->> 5,
    CASE WHEN s.number IS NULL OR s.expires_at <= :now THEN 2
        WHEN s.epoch <> (j.value ->> 1) THEN 1
        WHEN s.seq < (j.value ->> 2) THEN 0
        ELSE -1 END
FROM json_each(:batch) AS j LEFT JOIN session AS s ON s.id = (j.value ->> 0)
"""
# An expiry moves only by a quarter of what is left of it: it is an index's column, and every step would move it.
_PUT_SESSIONS = """
UPDATE session SET seq = b.seq, owner = :owner, runtime = :runtime,
    expires_at = CASE WHEN abs(b.expires - session.expires_at) > 0.25 * abs(b.expires - :now) THEN b.expires
        ELSE session.expires_at END
FROM batch AS b WHERE b.outcome = 0 AND session.number = b.number
"""
_PUT_BODIES = """
INSERT INTO body SELECT b.number, substr(:bodies, b.at + 1, b.size) FROM batch AS b WHERE b.outcome = 0
ON CONFLICT (number) DO UPDATE SET data = excluded.data
"""


class SqliteStore:
    """See contract.StateStore.

    Args:
        path: of the file, made where there is none.
        synchronous: full, a write is on the disk when it is told; normal, it outlives the process but not the machine.
        timeout_s: how long another process may keep the file locked.
        clock: unix seconds.

    Raises:
        StoreInvalid: the file is none of ours, or cannot be opened.
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
        try:
            # Whoever calls sees to it that it is one thread at a time.
            self._db = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
            self._open(synchronous)
        except sqlite3.Error as error:
            raise StoreInvalid(f"{path} cannot be used as a store: {error}") from error

    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """See StateStore."""
        with self._transaction():
            self._sweep(self._clock())
            return [self._create(creation) for creation in creations]

    def take(self, claims: Sequence[Claim]) -> list[Claimed]:
        """See StateStore."""
        with self._transaction():
            found = self._read([claim.session_id for claim in claims])
            return [self._take(claim, found.get(claim.session_id)) for claim in claims]

    def load(self, wanted: Sequence[tuple[str, int]]) -> list[Found]:
        """See StateStore."""
        with self._transaction():
            found = self._read([session_id for session_id, _ in wanted])
        answers: list[Found] = []
        for session_id, epoch in wanted:
            record = found.get(session_id)
            if record is None:
                answers.append(Missing())
            else:
                answers.append(record if epoch in {0, record.epoch} else Fenced(record.epoch))
        return answers

    def put(self, checkpoint: Checkpoint) -> list[Outcome]:
        """See StateStore."""
        rows, at = [], 0
        columns = (checkpoint.session_ids, checkpoint.epochs, checkpoint.seqs, checkpoint.expires, checkpoint.sizes)
        for session_id, epoch, seq, expires, size in zip(*columns, strict=True):
            rows.append((session_id, epoch, seq, expires, at, size))
            at += size
        now = self._clock()
        with self._transaction():
            self._execute("DELETE FROM batch")
            self._execute(_FILL, {"batch": json.dumps(rows), "now": now})
            for index, head in checkpoint.heads.items():
                self._put_head(index, head)
            self._execute(_PUT_SESSIONS, {"owner": checkpoint.owner, "runtime": checkpoint.runtime, "now": now})
            self._execute(_PUT_BODIES, {"bodies": checkpoint.bodies})
            told = self._execute("SELECT position, outcome FROM batch WHERE outcome > 0").fetchall()
        outcomes = [Outcome.DONE] * len(rows)
        for position, outcome in told:
            outcomes[position] = Outcome(outcome)
        return outcomes

    def delete(self, sessions: Sequence[tuple[str, int]]) -> list[Outcome]:
        """See StateStore."""
        outcomes = []
        with self._transaction():
            found = self._read([session_id for session_id, _ in sessions], bodies=False)
            gone = []
            for session_id, epoch in sessions:
                record = found.get(session_id)
                if record is None:
                    outcomes.append(Outcome.MISSING)
                elif record.epoch != epoch:
                    outcomes.append(Outcome.FENCED)
                else:
                    gone.append(session_id)
                    outcomes.append(Outcome.DONE)
            self._remove("id IN (SELECT value FROM json_each(?))", json.dumps(gone))
        return outcomes

    def listed(self, after: str, limit: int, model: str) -> Page:
        """See StateStore."""
        where = "s.model = ? AND s.id > ?" if model else "? = '' AND s.id > ?"
        with self._transaction():
            rows = self._execute(
                f"SELECT {_COLUMNS} FROM session AS s WHERE {where} AND s.expires_at > ? ORDER BY s.id LIMIT ?",
                (model, after, self._clock(), limit + 1),
            ).fetchall()
            total = self._counted(f"model:{model}" if model else "")
        return Page([_record(row, b"") for row in rows[:limit]], more=len(rows) > limit, total=total)

    def count(self) -> int:
        """See StateStore."""
        with self._transaction():
            return self._counted("")

    def sweep(self, now: float) -> int:
        """See StateStore."""
        with self._transaction():
            return self._sweep(now)

    def close(self) -> None:
        """See StateStore."""
        self._db.close()

    # ------------------------------------------------------------ within

    def _open(self, synchronous: Synchronous) -> None:
        db = self._db
        db.execute("PRAGMA busy_timeout")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.execute("PRAGMA page_size = 8192")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA cache_size = -65536")
        # In pages: what is written over and over is brought back into the file before the log is large.
        db.execute("PRAGMA wal_autocheckpoint = 4000")
        db.execute("PRAGMA journal_size_limit = 67108864")
        db.execute(_BATCH)
        with _Transaction(db):
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, _TABLES.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA}")
            elif version != _SCHEMA:
                raise StoreInvalid(f"{self.name} is of version {version}, and this server reads {_SCHEMA}")

    def _transaction(self) -> AbstractContextManager[None]:
        return _Transaction(self._db)

    def _execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
        return self._db.execute(statement, values)

    def _read(self, session_ids: Sequence[str], *, bodies: bool = True) -> dict[str, Record]:
        """Live records by id."""
        data, join = ("b.data", "LEFT JOIN body AS b ON b.number = s.number") if bodies else ("x''", "")
        rows = self._execute(
            f"SELECT {_COLUMNS}, {data} FROM json_each(?) AS j JOIN session AS s ON s.id = j.value {join} "
            "WHERE s.expires_at > ?",
            (json.dumps(list(session_ids)), self._clock()),
        )
        return {row[0]: _record(row[:-1], row[-1]) for row in rows}

    def _create(self, new: Creation) -> Created:
        known = self._read([new.session_id], bodies=False).get(new.session_id)
        if known is not None:
            ours = known.epoch == 1 and known.owner == new.owner and known.head == new.head
            return None if ours else Exists()
        for quota in new.quotas:
            if quota.most and self._counted(quota.key) >= quota.most:
                return QuotaFull(quota)
        # One that has expired and was not swept makes place.
        self._remove("id = ?", new.session_id)
        number = self._execute(
            "INSERT INTO session (id, model, epoch, seq, owner, runtime, expires_at, head, quotas) "
            "VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?)",
            (
                new.session_id,
                new.model,
                new.seq,
                new.owner,
                new.runtime,
                new.expires_at,
                new.head,
                json.dumps(sorted({"", f"model:{new.model}", *(quota.key for quota in new.quotas)})),
            ),
        ).lastrowid
        self._execute("INSERT INTO body VALUES (?, ?)", (number, new.body))
        self._count("id = ?", new.session_id, 1)
        return None

    def _take(self, claim: Claim, record: Record | None) -> Claimed:
        if record is None:
            return Missing()
        if claim.max_epoch and record.epoch > claim.max_epoch:
            return Fenced(record.epoch)
        if record.seq < claim.min_seq:
            return Behind(record.seq)
        self._execute(
            "UPDATE session SET epoch = epoch + 1, owner = ?, expires_at = ? WHERE id = ?",
            (claim.owner, claim.expires_at, claim.session_id),
        )
        taken = record._replace(epoch=record.epoch + 1, owner=claim.owner, expires_at=claim.expires_at)
        return taken._replace(body=b"") if record.epoch == claim.known_epoch else taken

    def _put_head(self, index: int, head: bytes) -> None:
        """Another head, where the record's seq is the same too."""
        self._execute(
            "UPDATE batch SET outcome = 0 WHERE position = ? AND outcome = -1 AND seq = "
            "(SELECT seq FROM session WHERE session.number = batch.number)",
            (index,),
        )
        self._execute(
            "UPDATE session SET head = ? WHERE number = (SELECT number FROM batch WHERE position = ? AND outcome = 0)",
            (head, index),
        )

    def _sweep(self, now: float) -> int:
        return self._remove(
            f"number IN (SELECT number FROM session WHERE expires_at <= ? ORDER BY expires_at LIMIT {_SWEEP})", now
        )

    def _remove(self, where: str, value: object) -> int:
        """Removes records, and counts them no more."""
        (count,) = self._execute(f"SELECT count(*) FROM session WHERE {where}", (value,)).fetchone()
        if count:
            self._count(where, value, -1)
            self._execute(f"DELETE FROM body WHERE number IN (SELECT number FROM session WHERE {where})", (value,))
            self._execute(f"DELETE FROM session WHERE {where}", (value,))
        return int(count)

    def _count(self, where: str, value: object, by: int) -> None:
        self._execute(
            "INSERT INTO quota SELECT j.value, :by * count(*) FROM "
            f"(SELECT quotas FROM session WHERE {where.replace('?', ':value')}) AS q, json_each(q.quotas) AS j "
            "GROUP BY j.value "
            "ON CONFLICT (key) DO UPDATE SET count = count + excluded.count",
            {"value": value, "by": by},
        )

    def _counted(self, key: str) -> int:
        row = self._execute("SELECT count FROM quota WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0


class _Transaction:
    """One transaction, the only one that writes. What SQLite cannot do is StoreUnavailable."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self._db.execute("ROLLBACK" if kind is not None else "COMMIT")
        except sqlite3.Error as second:
            if self._db.in_transaction:
                self._db.rollback()
            raise _unavailable(second) from second
        if isinstance(error, sqlite3.Error):
            raise _unavailable(error) from error


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    return StoreUnavailable(f"SQLite says: {error}")


def _record(row: Sequence[Any], body: bytes | None) -> Record:
    session_id, epoch, seq, head, owner, runtime, expires_at = row
    return Record(session_id, epoch, seq, head, body or b"", owner, runtime, expires_at)


