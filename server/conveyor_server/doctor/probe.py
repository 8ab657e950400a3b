"""One record that a store is asked to keep and to give up again: whether it can be read and written, and how fast.

Invariant: the record is a whole and valid one of a name that nobody has, counts against no bound, and is gone in a
minute even where it could not be removed.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from conveyor_proto.v1 import session_pb2, store_pb2

from conveyor_server.keeper import head
from conveyor_server.store.contract import Creation, Outcome, StateStore, StoreUnavailable

_OWNER = "conveyor doctor"
_LIVES_S = 60.0
_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Probed:
    """What a store did.

    Attributes:
        count: records in it.
        read_s: seconds that it took to say so, the second time: the first one connects.
        write_s: seconds of a write.
    """

    count: int
    read_s: float
    write_s: float


def probe(store: StateStore) -> Probed:
    """Reads, writes and removes.

    Raises:
        StoreUnavailable: it does not answer, or does not do it.
    """
    count = store.count()
    read_s = _timed(store.count)
    now = time.time()
    name, epoch = f"{_OWNER.replace(' ', '-')}-{secrets.token_hex(8)}", round(now * _MICRO)
    content = store_pb2.StoredSession(format=head.FORMAT, session_id=name, durability=session_pb2.DURABILITY_SYNC)
    content.created_at.FromNanoseconds(round(now * 1e9))
    content.idle_timeout.FromNanoseconds(round(_LIVES_S * 1e9))
    creation = Creation(name, "", head.sealed(content), b"", 0, _OWNER, "", now + _LIVES_S, epoch=epoch)
    write_s = _timed(lambda: store.create([creation]))
    if store.delete([(name, epoch)]) != [Outcome.DONE]:
        raise StoreUnavailable("what was written a moment ago is not there: it drops what it is given")
    return Probed(count, read_s, write_s)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
