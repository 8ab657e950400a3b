"""The file of a SqliteStore. Invariant: a file that is not ours is refused before anything in it is changed.

`session` has what a fence looks at, and `body`, by the same number, what is large: so that looking reads few pages.
Records are counted by the quotas that they have, by triggers, so that a count is true whoever removes one.
"""

import sqlite3
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

from conveyor_server.store.contract import StoreInvalid, StoreUnavailable

Synchronous: TypeAlias = Literal["full", "normal"]
_SCHEMA = 1
# "CVYR": tells our files from others'.
_APPLICATION = 0x43565952
# Moments are unix milliseconds. `due` is never after `expires`: it is looked at then, and not before.
_STATEMENTS = (
    """
    CREATE TABLE session (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        owner TEXT NOT NULL,
        runtime TEXT NOT NULL,
        expires INTEGER NOT NULL,
        due INTEGER NOT NULL,
        quotas TEXT NOT NULL,
        head BLOB NOT NULL
    ) STRICT
    """,
    "CREATE INDEX session_due ON session (due)",
    "CREATE INDEX session_model ON session (model, id)",
    "CREATE TABLE body (number INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "CREATE TABLE quota (key TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TRIGGER session_added AFTER INSERT ON session BEGIN
        INSERT INTO quota SELECT value, 1 FROM json_each(new.quotas) WHERE true
        ON CONFLICT (key) DO UPDATE SET count = count + 1;
    END
    """,
    """
    CREATE TRIGGER session_removed AFTER DELETE ON session BEGIN
        DELETE FROM body WHERE number = old.number;
        UPDATE quota SET count = count - 1 WHERE key IN (SELECT value FROM json_each(old.quotas));
        DELETE FROM quota WHERE count = 0 AND key IN (SELECT value FROM json_each(old.quotas));
    END
    """,
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_SCHEMA}",
)
_BATCH = """
CREATE TEMP TABLE batch (
    position INTEGER PRIMARY KEY, number INTEGER, seq INTEGER, expires INTEGER, body_at INTEGER, body_size INTEGER,
    head_at INTEGER, head_size INTEGER, outcome INTEGER NOT NULL
)
"""
_ADVICE = {
    "SQLITE_BUSY": "another process keeps its file locked",
    "SQLITE_FULL": "its disk is full",
    "SQLITE_READONLY": "its file or folder must not be written",
    "SQLITE_IOERR": "its disk fails",
    "SQLITE_CANTOPEN": "its file cannot be opened: look at the folder and its permissions",
    "SQLITE_CORRUPT": "its file is damaged: restore it from a copy",
    "SQLITE_NOTADB": "its file is damaged: restore it from a copy",
}
# Servers that start together open a new file one after the other.
_PATIENCE_S = 5.0
# SQLite looks whether a lock is free after 1, 2, 5, 10, ... 100 ms, and would hardly ever find the gaps between the
# writes of a busy process. Begun anew every 8 ms, it looks at 0, 1, 3, 8.
_TRY_MS = 8

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
Owner = TypeVar("Owner", bound="Patient")


def open_file(path: Path, synchronous: Synchronous) -> sqlite3.Connection:
    """Opens a store's file, or makes it; readable by its owner alone. Not tied to a thread.

    What is done with it gives up soon where another process has it locked: see `patient`.

    Args:
        path: of the file.
        synchronous: see SqliteStore.

    Raises:
        StoreInvalid: it is none of ours, or of another version, or cannot be opened.
        StoreUnavailable: another process keeps it locked.
    """
    try:
        path.touch(mode=0o600)
        db = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise StoreInvalid(f"{path} cannot be opened: {error}") from error
    try:
        # At one moment: another server may be making it.
        db.execute("BEGIN")
        _check(db, path)
        db.execute("COMMIT")
        _prepare(db, path, synchronous)
        db.execute(f"PRAGMA busy_timeout = {_TRY_MS}")
    except sqlite3.Error as error:
        db.close()
        if _is_busy(error):
            raise unavailable(error) from error
        raise StoreInvalid(f"{path} cannot be used as a store: {error}") from error
    except StoreInvalid:
        db.close()
        raise
    return db


class Patient(Protocol):
    """What has a file that others lock now and then.

    Attributes:
        timeout_s: how long a call waits for them.
    """

    timeout_s: float


def patient(call: "Callable[Concatenate[Owner, Given], Answer]") -> "Callable[Concatenate[Owner, Given], Answer]":
    """A call that is done again and again while another process has the file locked.

    Whatever it does is one transaction: where it fails, nothing of it was done.

    Raises:
        StoreUnavailable: the file was locked all the time, or SQLite cannot do it.
    """

    @wraps(call)
    def waiting(owner: Owner, /, *given: Given.args, **named: Given.kwargs) -> Answer:
        until = time.monotonic() + owner.timeout_s
        while True:
            try:
                return call(owner, *given, **named)
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() > until:
                    raise unavailable(error) from error

    return waiting


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    """What to say of what SQLite could not do."""
    advice = _ADVICE.get(_kind(error))
    return StoreUnavailable(f"{advice} ({error})" if advice else f"SQLite says: {error}")


def _is_busy(error: sqlite3.Error) -> bool:
    return _kind(error) == "SQLITE_BUSY"


def _kind(error: sqlite3.Error) -> str:
    """The primary code of an error: SQLITE_IOERR of SQLITE_IOERR_WRITE. Errors of the Python module have none."""
    return "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])


def _check(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty; StoreInvalid where it is not and is none of ours."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not (version or application or tables):
        return True
    if application != _APPLICATION:
        raise StoreInvalid(f"{path} is a database of something else")
    if version != _SCHEMA:
        raise StoreInvalid(f"{path} is of version {version}, and this server reads version {_SCHEMA}")
    return False


def _prepare(db: sqlite3.Connection, path: Path, synchronous: Synchronous) -> None:
    db.execute("PRAGMA page_size = 8192")
    _use_log(db, path)
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA temp_store = MEMORY")
    db.execute("PRAGMA cache_size = -65536")
    # In pages: what is written over and over is brought back into the file before the log is large.
    db.execute("PRAGMA wal_autocheckpoint = 4000")
    db.execute("PRAGMA journal_size_limit = 67108864")
    db.execute(_BATCH)
    db.execute("BEGIN IMMEDIATE")
    if _check(db, path):
        for statement in _STATEMENTS:
            db.execute(statement)
    db.execute("COMMIT")


def _use_log(db: sqlite3.Connection, path: Path) -> None:
    """Has writes go to a log first, so that readers and a writer do not wait for each other."""
    patience = time.monotonic() + _PATIENCE_S
    while True:
        try:
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # Here, SQLite does not wait for others by itself.
            if not _is_busy(error) or time.monotonic() > patience:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StoreInvalid(f"{path} is where SQLite cannot keep a write-ahead log: use a file on a local disk")
