"""Files that cannot be a store, or cannot be written now: an error says what it is, and nothing is lost."""

import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conveyor_server.store.contract import Outcome, StoreInvalid, StoreUnavailable
from conveyor_server.store.sqlite import SqliteStore
from store_calls import add, creation, put, read

# More than SQLite lays aside before it takes pages from the file.
LARGE = b"x" * 1_000_000


@contextmanager
def another(path: Path) -> Iterator[sqlite3.Connection]:
    """What another process may do with the file."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
        yield db


def test_a_file_is_for_its_owner_alone(path: Path, sqlite_store: SqliteStore) -> None:
    add(sqlite_store, "a")
    # With its log and the index of that.
    files = list(path.parent.glob(f"{path.name}*"))
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_file_is_opened_again(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        add(store, "a", body=b"kept")
    with closing(SqliteStore(path)) as store:
        assert read(store).body == b"kept"


@pytest.mark.parametrize("synchronous", ["full", "normal"])
def test_a_file_is_written_as_safely_as_was_asked(path: Path, synchronous: str) -> None:
    with closing(SqliteStore(path, synchronous=synchronous)) as store:  # type: ignore[arg-type]
        assert store._db.execute("PRAGMA synchronous").fetchone() == ({"normal": 1, "full": 2}[synchronous],)
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("PRAGMA application_id = 1", "is a database of something else"),
        ("PRAGMA user_version = 2", "is of version 2, and this server reads version 1"),
    ],
)
def test_a_file_of_another_program_or_version_is_refused_and_left_as_it_is(path: Path, change: str, said: str) -> None:
    SqliteStore(path).close()
    with another(path) as db:
        db.execute(change)
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match=said):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_database_that_somebody_else_has_begun_is_refused_and_left_as_it_is(path: Path) -> None:
    with another(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match="something else"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"notes of mine\n" * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match="cannot be used as a store: file is not a database"):
        SqliteStore(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["no/such/folder/sessions.db", "."])
def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(StoreInvalid, match="cannot be opened"):
        SqliteStore(tmp_path / place)


def test_several_servers_that_start_at_once_make_one_file(path: Path) -> None:
    errors, stores = [], []

    def begin() -> None:
        try:
            stores.append(SqliteStore(path))
        except Exception as error:  # told below
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    add(stores[0], "a")
    for store in stores:
        assert read(store).body == b"body"
        store.close()


def test_a_file_that_stays_locked_is_away_and_what_was_asked_is_not_done(path: Path) -> None:
    with closing(SqliteStore(path, timeout_s=0.1)) as store, another(path) as db:
        add(store, "a")
        db.execute("BEGIN IMMEDIATE")
        for write in (lambda: put(store, "a", 1, 1), lambda: store.create([creation("b")])):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="another process keeps its file locked"):
                write()
            assert time.monotonic() - began >= 0.1
        # Whoever only reads does not wait.
        assert read(store).seq == 0
        db.execute("ROLLBACK")
        assert read(store).seq == 0
        assert put(store, "a", 1, 1) is Outcome.DONE
        assert store.count() == 1


def test_a_file_that_is_locked_for_a_moment_is_waited_for(path: Path) -> None:
    with closing(SqliteStore(path, timeout_s=20.0)) as store, another(path) as db:
        add(store, "a")
        db.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, db.execute, ["ROLLBACK"])
        timer.start()
        assert put(store, "a", 1, 1) is Outcome.DONE
        timer.join()


@pytest.mark.parametrize(
    ("trouble", "mended", "said"),
    [
        ("PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000", "its disk is full"),
        ("PRAGMA query_only = on", "PRAGMA query_only = off", "its file or folder must not be written"),
    ],
)
def test_a_file_that_cannot_be_written_now_keeps_what_it_has(path: Path, trouble: str, mended: str, said: str) -> None:
    with closing(SqliteStore(path)) as store:
        add(store, "a", "b")
        store._db.execute(trouble)
        with pytest.raises(StoreUnavailable, match=said):
            put(store, "a", 1, 1, LARGE)
        with pytest.raises(StoreUnavailable, match=said):
            store.create([creation("new", body=LARGE)])
        assert [(read(store, name).seq, read(store, name).body) for name in "ab"] == [(0, b"body")] * 2
        store._db.execute(mended)
        assert put(store, "a", 1, 1, LARGE) is Outcome.DONE
        assert read(store).body == LARGE
        assert store.count() == 2


def test_a_file_that_is_damaged_says_so(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        add(store, *(f"s{number}" for number in range(100)), body=b"x" * 10_000)
    with path.open("r+b") as file:
        # All but the first page, which says what it is.
        file.seek(8192)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    with closing(SqliteStore(path)) as store, pytest.raises(StoreUnavailable, match="its file is damaged"):
        read(store, "s5")
