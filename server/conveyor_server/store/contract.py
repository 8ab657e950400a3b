"""The contract of a state store: records of sessions, and the fence that lets one owner at a time write each.

Invariants, whatever the store: a record's epoch rises by one whenever somebody takes the session, and only whoever took
it last can write or delete it (a session that is made anew under a name begins at an epoch that the former one did not
reach, so that whoever has that one still is fenced too); its seq never falls; a call does all of what it answers for
or, where it raises, nobody knows how much, and everything in it can be tried again. Each call is one transaction or one
round trip, however many sessions it is about (a put of very many bytes may be several).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias


class StoreUnavailable(Exception):  # noqa: N818 - it says what happened
    """The store did not answer, or could not do it now; the message says why, without secrets."""


def not_too_late(claims: Sequence["Claim"]) -> None:
    """Returns while the claims can be done.

    Raises:
        StoreUnavailable: it is too late for one of them.
    """
    if any(claim.not_after < time.monotonic() for claim in claims):
        raise StoreUnavailable("it was asked too long ago: whoever asked has gone elsewhere")


class StoreInvalid(Exception):  # noqa: N818 - it says what happened
    """What was named is no store of ours; the message says why."""


class Outcome(IntEnum):
    """What became of one write."""

    DONE = 0
    # Somebody took the session since: its epoch in the store is another.
    FENCED = 1
    # There is no such record: it was closed, it has expired, or the store has lost it.
    MISSING = 2


class Record(NamedTuple):
    """What a store holds of a session.

    Attributes:
        session_id: its name.
        epoch: of whoever took it last.
        seq: the last step that `body` has in it.
        head, body: as they were given, byte for byte; see keeper.head and keeper.body.
        owner: of the replica that took it last, for people.
        runtime: of the replica that wrote `body`.
        expires_at: unix seconds; stores round it to a millisecond.
    """

    session_id: str
    epoch: int
    seq: int
    head: bytes
    body: bytes
    owner: str
    runtime: str
    expires_at: float


class Quota(NamedTuple):
    """Sessions that the store may hold of one kind.

    Attributes:
        key: names the kind: "" all sessions, `model:NAME` those of a model, `tenant:NAME`.
        most: how many.
    """

    key: str
    most: int


@dataclass(frozen=True, slots=True)
class Creation:
    """A session that is to be there from now on.

    Attributes:
        session_id, head, body, seq, owner, runtime, expires_at: as of Record.
        model: as of the head; `listed` picks by it.
        quotas: none of them may be exceeded by it. Its keys are what the record counts against all its life; a most of
            0 is no bound. One that names a model names this one.
        epoch: its first; no session of that name may ever have had it.
    """

    session_id: str
    model: str
    head: bytes
    body: bytes
    seq: int
    owner: str
    runtime: str
    expires_at: float
    quotas: Sequence[Quota] = ()
    epoch: int = 1

    def counted_as(self) -> list[str]:
        """Keys of all kinds that it is of, each once: "" and its model's first, whether they are bounded or not."""
        return list(dict.fromkeys(("", f"model:{self.model}", *(quota.key for quota in self.quotas))))


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody takes a session: its epoch rises.

    Attributes:
        session_id: which.
        owner: who.
        runtime: of who writes it from now on. `Record.runtime` in the answer is that of before; it changes with `put`.
        expires_at: unix seconds.
        max_epoch: it is refused where the epoch is above this; 0: any.
        known_epoch: the body is left out of the answer (b"") where the epoch was this: the claimant has it. 0: never.
        not_after: seconds of time.monotonic: it is not done later than that, but StoreUnavailable; whoever asked has
            asked elsewhere by then, and would lose the session to nobody.
        min_seq: it is refused while the record's seq is below this: its last owner is about to write it. 0: any.
    """

    session_id: str
    owner: str
    runtime: str
    expires_at: float
    max_epoch: int = 0
    known_epoch: int = 0
    min_seq: int = 0
    not_after: float = math.inf


class Exists(NamedTuple):
    """The id is taken."""


class QuotaFull(NamedTuple):
    """A quota is used up."""

    quota: Quota


class Missing(NamedTuple):
    """There is no such record."""


class Fenced(NamedTuple):
    """The epoch is another than was asked for, or above what was allowed."""

    epoch: int


class Behind(NamedTuple):
    """The record has not come as far as was asked for."""

    seq: int


Created: TypeAlias = Exists | QuotaFull | None
# The record as it is after the claim: its epoch is the claimant's, its owner too.
Claimed: TypeAlias = Record | Missing | Fenced | Behind
Found: TypeAlias = Record | Missing | Fenced


@dataclass(slots=True)
class Checkpoint:
    """States of sessions, as of one moment, from one owner.

    Attributes:
        session_ids: which; each at most once.
        epochs: of the sessions, as their owner knows them.
        seqs: the steps that the bodies have in them.
        expires: unix seconds, of each.
        bodies: one after the other.
        sizes: bytes of each.
        owner: who writes.
        runtime: of who writes.
        heads: by position: other heads, for sessions that are of another version of their model from now on. Head and
            body change together.
    """

    session_ids: list[str]
    epochs: list[int]
    seqs: list[int]
    expires: list[float]
    bodies: bytes
    sizes: list[int]
    owner: str
    runtime: str
    heads: dict[int, bytes] = field(default_factory=dict)

    def parts(self, most_bytes: int) -> "Iterator[Checkpoint]":
        """It, or, where its bodies are more than a store can be given at once, parts of it that have at most that many.

        A body that alone is more is a part of its own.
        """
        if len(self.bodies) <= most_bytes:
            yield self
            return
        first = start = end = 0
        for index, size in enumerate(self.sizes):
            if end + size - start > most_bytes and index > first:
                yield self._part(first, index, self.bodies[start:end])
                first, start = index, end
            end += size
        yield self._part(first, len(self.sizes), self.bodies[start:end])

    def _part(self, first: int, last: int, bodies: bytes) -> "Checkpoint":
        return Checkpoint(
            self.session_ids[first:last],
            self.epochs[first:last],
            self.seqs[first:last],
            self.expires[first:last],
            bodies,
            self.sizes[first:last],
            self.owner,
            self.runtime,
            {index - first: head for index, head in self.heads.items() if first <= index < last},
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Some records, without their bodies (b""), by id.

    Attributes:
        records: in the order of their ids.
        more: there are others behind them.
        total: how many there are in all.
    """

    records: Sequence[Record] = field(default_factory=list)
    more: bool = False
    total: int = 0


# Of what stores keep; in milliseconds, and so far below the integers that floating-point numbers have.
_LATEST_S = 1e12


def milliseconds(moment: float) -> int:
    """What a store keeps of a moment in unix seconds; infinity is some day."""
    return round(min(max(moment, 0.0), _LATEST_S) * 1000)


class StateStore(Protocol):
    """A store. One thread at a time; not the core thread, for every method may wait.

    Every method but `close` raises StoreUnavailable.

    Attributes:
        name: for people: what it is and where, without passwords.
        shared: other processes may write to it too.
    """

    name: str
    shared: bool

    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """Adds records; None for each that was added. Ids are distinct; a record that has expired is not there.

        One that is there already, with that very epoch, owner and head, was added by an earlier try: None.
        """

    def take(self, claims: Sequence[Claim]) -> list[Claimed]:
        """Takes sessions; ids are distinct."""

    def load(self, wanted: Sequence[tuple[str, int]]) -> list[Found]:
        """Records of (session id, epoch), which must be theirs still; epoch 0: whatever it is. Nothing changes."""

    def put(self, checkpoint: Checkpoint) -> list[Outcome]:
        """Writes states where the epoch is the owner's still; in the order of the checkpoint, an outcome for each.

        One whose seq the record already has, or has passed, is DONE without being written: a write that was tried
        twice. With another head it is written where the seq is the same, too.
        """

    def delete(self, sessions: Sequence[tuple[str, int]]) -> list[Outcome]:
        """Removes records of (session id, epoch); ids are distinct."""

    def listed(self, after: str, limit: int, model: str, tenant: str = "") -> Page:
        """At most `limit` records whose ids are above `after`, of one model or (empty) of all, and of a tenant.

        A tenant's are those whose ids begin with its prefix, see identity.caller. The total is of all of these.
        """

    def count(self) -> int:
        """How many records there are."""

    def sweep(self, now: float) -> int:
        """Removes what has expired, some thousands at most; returns how many. Nobody is shown those before, either."""

    def close(self) -> None:
        """Lets go of files and connections."""
