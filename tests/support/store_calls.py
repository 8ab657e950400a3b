"""What tests say to a store: its calls with all that is of no interest filled in."""

import time
from collections.abc import Sequence
from typing import Any

from conveyor_server.store.contract import Checkpoint, Claim, Creation, Outcome, Quota, Record, StateStore

LATER_S = 3600.0


def creation(session_id: str = "a", **fields: Any) -> Creation:
    """A session that expires in an hour."""
    given = {
        "model": "m",
        "head": b"head",
        "body": b"body",
        "seq": 0,
        "owner": "first",
        "runtime": "cpu",
        "expires_at": time.time() + LATER_S,
        "quotas": (),
    }
    return Creation(session_id, **given | fields)


def claim(session_id: str = "a", **fields: Any) -> Claim:
    """Somebody takes it."""
    given = {"owner": "second", "runtime": "gpu", "expires_at": time.time() + LATER_S}
    return Claim(session_id, **given | fields)


def checkpoint(*rows: tuple[str, int, int, bytes], **fields: Any) -> Checkpoint:
    """Of (session id, epoch, seq, body); `expires_at` is for all of them."""
    ids, epochs, seqs, bodies = ([row[place] for row in rows] for place in range(4))
    expires = [fields.pop("expires_at", time.time() + LATER_S)] * len(rows)
    given = {"owner": "writer", "runtime": "tpu"}
    sizes = [len(body) for body in bodies]
    return Checkpoint(ids, epochs, seqs, expires, b"".join(bodies), sizes, **given | fields)


def add(store: StateStore, *session_ids: str, **fields: Any) -> None:
    """Creates sessions, which must be new."""
    made = [creation(session_id, **fields) for session_id in session_ids]
    assert store.create(made) == [None] * len(made)


def put(store: StateStore, session_id: str, epoch: int, seq: int, body: bytes = b"new", **fields: Any) -> Outcome:
    """Writes one state."""
    [outcome] = store.put(checkpoint((session_id, epoch, seq, body), **fields))
    return outcome


def read(store: StateStore, session_id: str = "a") -> Record:
    """A record that must be there."""
    [found] = store.load([(session_id, 0)])
    assert isinstance(found, Record), found
    return found


def quotas(**most: int) -> Sequence[Quota]:
    """By kind: `all`, `tenant`."""
    keys = {"all": "", "model": "model:m", "tenant": "tenant:t"}
    return [Quota(keys[name], count) for name, count in most.items()]
