"""A process that uses a store beside others: `python -m store_worker take|write STORE`.

It prints `ready` when the store is open, and begins when it is told so by a line. `take` takes the session "a" as often
as TAKES says and prints the epochs that it was given; `write` writes the sessions of NAMES until it is killed, and
prints each seq when all of them are written.
"""

import sys
import time
from itertools import count

from conveyor_server.store.contract import Checkpoint, Claim, Outcome, Record, StateStore
from conveyor_server.store.opening import open_store

TAKES = 150
NAMES = [f"s{number}" for number in range(40)]
SIZE = 2100


def body_of(name: str, seq: int) -> bytes:
    """What the worker writes: of no other session, and of no other step."""
    return (f"{name}.{seq};".encode() * SIZE)[:SIZE]


def _take(store: StateStore) -> None:
    epochs = []
    for _ in range(TAKES):
        [taken] = store.take([Claim("a", "worker", "cpu", time.time() + 3600)])
        assert isinstance(taken, Record), taken
        epochs.append(taken.epoch)
        # A file's lock is not fair: whoever comes again at once has it again.
        time.sleep(0.001)
    print(*epochs, flush=True)


def _write(store: StateStore) -> None:
    many = len(NAMES)
    for seq in count(1):
        bodies = b"".join(body_of(name, seq) for name in NAMES)
        expires = [time.time() + 3600] * many
        outcomes = store.put(Checkpoint(NAMES, [1] * many, [seq] * many, expires, bodies, [SIZE] * many, "w", "cpu"))
        assert outcomes == [Outcome.DONE] * many
        print(seq, flush=True)


if __name__ == "__main__":
    opened = open_store(sys.argv[2], timeout_s=20.0)
    assert opened is not None
    # It connects or reads now.
    opened.count()
    print("ready", flush=True)
    sys.stdin.readline()
    {"take": _take, "write": _write}[sys.argv[1]](opened)
