"""Stores that several processes use, and what is left of a write when its process is killed."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conveyor_server.store.contract import Record, StateStore
from conveyor_server.store.sqlite import SqliteStore
from conveyor_server.store.valkey import ValkeyStore
from store_calls import add, claim, creation, put, read
from store_worker import NAMES, TAKES, body_of
from valkey_process import ValkeyProcess

Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(python_path: dict[str, str]) -> Iterator[Start]:
    """Starts a worker that waits for a line; it is killed at the end."""
    with ExitStack() as ends:

        def begin(what: str, store: str) -> "subprocess.Popen[str]":
            pipe = subprocess.PIPE
            command = [sys.executable, "-m", "store_worker", what, store]
            worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=python_path)
            ends.enter_context(worker)
            ends.callback(worker.kill)
            return worker

        yield begin


def go(*workers: "subprocess.Popen[str]") -> None:
    """Lets workers begin when all of them are ready."""
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()


def epochs_of(worker: "subprocess.Popen[str]") -> list[int]:
    assert worker.stdout is not None
    return [int(epoch) for epoch in worker.stdout.readline().split()]


def address_of(store: StateStore) -> str:
    return store.name


@pytest.fixture(params=["sqlite", "valkey"])
def shared_store(request: pytest.FixtureRequest) -> StateStore:
    """The two that processes share."""
    made: StateStore = request.getfixturevalue(f"{request.param}_store")
    return made


def test_of_two_processes_that_take_a_session_each_epoch_goes_to_one(shared_store: StateStore, start: Start) -> None:
    add(shared_store, "a")
    workers = [start("take", address_of(shared_store)) for _ in range(2)]
    go(*workers)
    first, second = (epochs_of(worker) for worker in workers)
    assert sorted(first + second) == list(range(2, 2 * TAKES + 2))
    assert first == sorted(first)
    assert second == sorted(second)
    # They were at it together.
    assert first[0] < second[-1]
    assert second[0] < first[-1]
    assert read(shared_store).epoch == 2 * TAKES + 1


def test_whoever_lost_a_session_to_another_handle_is_fenced(
    shared_store: StateStore, path: Path, valkey_server: ValkeyProcess
) -> None:
    other: StateStore
    if isinstance(shared_store, SqliteStore):
        other = SqliteStore(path, synchronous="normal")
    else:
        other = ValkeyStore(valkey_server.url)
    add(shared_store, "a")
    [taken] = other.take([claim()])
    assert isinstance(taken, Record)
    assert put(shared_store, "a", 1, 1, b"late").name == "FENCED"
    assert put(other, "a", 2, 1, b"mine").name == "DONE"
    assert read(shared_store).body == b"mine"
    other.close()


@pytest.mark.parametrize("synchronous", ["full", "normal"])
@pytest.mark.parametrize("after_s", [0.0, 0.013, 0.04])
def test_a_file_whose_writer_is_killed_has_whole_writes_and_all_that_were_told_done(
    path: Path, start: Start, synchronous: str, after_s: float
) -> None:
    address = f"sqlite:{path}?synchronous={synchronous}"
    before = SqliteStore(path)
    add(before, *NAMES)
    before.close()
    worker = start("write", address)
    go(worker)
    assert worker.stdout is not None
    for _ in range(5):
        told = int(worker.stdout.readline())
    time.sleep(after_s)
    worker.kill()
    told = max([told, *(int(line) for line in worker.stdout if line.endswith("\n"))])
    store = SqliteStore(path)
    found = store.load([(name, 1) for name in NAMES])
    records = [record for record in found if isinstance(record, Record)]
    # One transaction: all of them or none.
    [seq] = {record.seq for record in records}
    assert seq in {told, told + 1}
    assert [record.body for record in records] == [body_of(name, seq) for name in NAMES]
    assert store.create([creation("new")]) == [None]
    store.close()


def test_a_server_that_is_killed_has_whole_writes_and_all_that_were_told_done(tmp_path: Path, start: Start) -> None:
    server = ValkeyProcess(tmp_path, appendonly="yes", appendfsync="always")
    store = ValkeyStore(server.url, timeout_s=10.0)
    add(store, *NAMES)
    worker = start("write", server.url)
    go(worker)
    assert worker.stdout is not None
    for _ in range(5):
        worker.stdout.readline()
    worker.kill()
    server.kill()
    [*_, told] = [5, *(int(line) for line in worker.stdout if line.endswith("\n"))]
    server.start()
    records = [record for record in store.load([(name, 1) for name in NAMES]) if isinstance(record, Record)]
    [seq] = {record.seq for record in records}
    assert seq in {told, told + 1}
    assert [record.body for record in records] == [body_of(name, seq) for name in NAMES]
    store.close()
    server.kill()
