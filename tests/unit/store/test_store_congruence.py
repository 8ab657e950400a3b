"""Random calls to all three stores at once: they answer the same."""

import time

import hypothesis
from conveyor_server.store.contract import Checkpoint, Claim, Creation, Quota, StateStore
from conveyor_server.store.memory import MemoryStore
from conveyor_server.store.sqlite import SqliteStore
from conveyor_server.store.valkey import ValkeyStore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

IDS = ["a", "b", "t/a", "A.1:x", "t/-", "u/b"]
TENANTS = ["tenant:t", "tenant:ü \n,"]
EVER = 1e12
# From now, in seconds: past, long past, and moments that sweeps pass one by one; far enough apart for any run.
MOMENTS = [-20_000.0, -5.0, 1000.0, 2000.0, 50_000.0, 1_000_000.0]

ids = st.sampled_from(IDS)
moments = st.sampled_from(MOMENTS)
# More often a moment that leaves the record.
lives = st.sampled_from([*MOMENTS, *(moment for moment in MOMENTS if moment > 0)])
epochs = st.integers(1, 4)
seqs = st.one_of(st.integers(0, 5), st.sampled_from([2**53 - 1, 2**40]))
blobs = st.one_of(st.binary(max_size=5), st.just(bytes(range(256)) * 9))
owners = st.sampled_from(["r1", "r2", "ü"])
claims = st.builds(
    Claim,
    session_id=ids,
    owner=owners,
    runtime=owners,
    expires_at=lives,
    max_epoch=st.integers(0, 4),
    known_epoch=st.integers(0, 4),
    min_seq=st.one_of(st.just(0), seqs),
)


@st.composite
def creations(draw: st.DrawFn) -> Creation:
    model = draw(st.sampled_from(["m", "n"]))
    quota = st.builds(Quota, st.sampled_from(["", f"model:{model}", *TENANTS]), st.integers(0, 3))
    return Creation(
        session_id=draw(ids),
        model=model,
        head=draw(blobs),
        body=draw(blobs),
        seq=draw(seqs),
        owner=draw(owners),
        runtime=draw(owners),
        expires_at=draw(lives),
        quotas=draw(st.lists(quota, max_size=3, unique_by=lambda quota: quota.key)),
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    names = draw(st.lists(ids, max_size=4, unique=True))
    count = len(names)
    bodies = [draw(blobs) for _ in names]
    return Checkpoint(
        names,
        [draw(epochs) for _ in names],
        [draw(seqs) for _ in names],
        [draw(lives) for _ in names],
        b"".join(bodies),
        [len(body) for body in bodies],
        draw(owners),
        draw(owners),
        draw(st.dictionaries(st.integers(0, count - 1), blobs)) if count else {},
    )


class Stores(RuleBasedStateMachine):
    """Says the same to three stores.

    Attributes:
        others: those that are held to the one in memory.
    """

    others: tuple[StateStore, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.now = round(time.time())
        self.stores: tuple[StateStore, ...] = (MemoryStore(), *self.others)
        for store in self.others:
            store.sweep(EVER * 2)

    def moved(self, item: Creation | Claim) -> Creation | Claim:
        fields = {name: getattr(item, name) for name in item.__slots__}
        return type(item)(**fields | {"expires_at": self.now + item.expires_at})

    def same(self, name: str, *arguments: object) -> None:
        answers = [getattr(store, name)(*arguments) for store in self.stores]
        assert answers[1:] == answers[:1] * len(self.others)

    @rule(made=st.lists(creations(), min_size=1, max_size=4, unique_by=lambda item: item.session_id))
    def create(self, made: list[Creation]) -> None:
        self.same("create", [self.moved(item) for item in made])

    @rule(made=st.lists(claims, max_size=4, unique_by=lambda item: item.session_id))
    def take(self, made: list[Claim]) -> None:
        self.same("take", [self.moved(item) for item in made])

    @rule(made=checkpoints())
    def put(self, made: Checkpoint) -> None:
        made.expires = [self.now + expires for expires in made.expires]
        self.same("put", made)

    @rule(wanted=st.lists(st.tuples(ids, epochs), max_size=3, unique_by=lambda item: item[0]))
    def delete(self, wanted: list[tuple[str, int]]) -> None:
        self.same("delete", wanted)

    @rule(wanted=st.lists(st.tuples(ids, st.integers(0, 4)), max_size=4))
    def load(self, wanted: list[tuple[str, int]]) -> None:
        self.same("load", wanted)

    @rule(
        after=st.sampled_from(["", "A", *IDS]),
        limit=st.integers(1, 4),
        model=st.sampled_from(["", "m", "n", "o"]),
        tenant=st.sampled_from(["", "t", "u"]),
    )
    def listed(self, after: str, limit: int, model: str, tenant: str) -> None:
        self.same("listed", after, limit, model, tenant)

    @rule(moment=st.sampled_from([500.0, 1500.0, 3000.0, 100_000.0]))
    def sweep(self, moment: float) -> None:
        # How many it removes depends on what was removed before, unseen.
        for store in self.stores:
            store.sweep(self.now + moment)

    def teardown(self) -> None:
        self.same("load", [(name, 0) for name in IDS])
        self.same("listed", "", 100, "")
        self.same("count")


def test_three_stores_answer_random_calls_alike(valkey_store: ValkeyStore, sqlite_store: SqliteStore) -> None:
    class OfTheseStores(Stores):
        others = (sqlite_store, valkey_store)

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        OfTheseStores,
        settings=settings(
            max_examples=150,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
