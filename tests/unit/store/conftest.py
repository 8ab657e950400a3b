"""The three stores with real parts, each empty at the beginning of a test."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import valkey
from conveyor_server.store.contract import StateStore
from conveyor_server.store.memory import MemoryStore
from conveyor_server.store.sqlite import SqliteStore
from conveyor_server.store.valkey import ValkeyStore
from valkey_process import ValkeyProcess


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """A server for all tests that do it no harm."""
    server = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def commands(valkey_server: ValkeyProcess) -> Iterator[valkey.Valkey]:
    """A client of the server, which is empty."""
    with valkey.Valkey(port=valkey_server.port) as client:
        client.flushdb()
        yield client


@pytest.fixture
def valkey_store(valkey_server: ValkeyProcess, commands: valkey.Valkey) -> Iterator[ValkeyStore]:
    """A store in the server."""
    store = ValkeyStore(valkey_server.url, timeout_s=10.0)
    yield store
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file that a store can be made in."""
    return tmp_path / "sessions.db"


@pytest.fixture
def sqlite_store(path: Path) -> Iterator[SqliteStore]:
    """A store in a file; as durable as need be."""
    store = SqliteStore(path, synchronous="normal", timeout_s=10.0)
    yield store
    store.close()


@pytest.fixture(params=["memory", "sqlite", "valkey"])
def store(request: pytest.FixtureRequest) -> StateStore:
    """Each of the three in turn."""
    if request.param == "memory":
        return MemoryStore()
    made: StateStore = request.getfixturevalue(f"{request.param}_store")
    return made


@pytest.fixture
def set_epoch(store: StateStore, request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Gives a record an epoch that it would take years to reach."""

    def in_memory(session_id: str, epoch: int) -> None:
        assert isinstance(store, MemoryStore)
        store._records[session_id] = store._records[session_id]._replace(epoch=epoch)

    def in_file(session_id: str, epoch: int) -> None:
        assert isinstance(store, SqliteStore)
        store._db.execute("UPDATE session SET epoch = ? WHERE id = ?", (epoch, session_id))

    def in_server(session_id: str, epoch: int) -> None:
        client, key = request.getfixturevalue("commands"), f"conveyor:session:{session_id}"
        _, rest = client.hget(key, "at").split(b" ", 1)
        client.hset(key, "at", b"%d %s" % (epoch, rest))

    return {MemoryStore: in_memory, SqliteStore: in_file, ValkeyStore: in_server}[type(store)]


@pytest.fixture
def pass_by() -> Callable[[float], None]:
    """Waits until a moment has passed, for every clock of this machine."""

    def wait(moment: float) -> None:
        while time.time() <= moment + 0.002:
            time.sleep(0.005)

    return wait


@pytest.fixture
def python_path() -> dict[str, str]:
    """Environment of a process that imports what this one does."""
    import sys

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
