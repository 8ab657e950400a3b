"""Records: who may write them, what is told of each of a batch. Each sentence of the contract, for each store."""

import string
import time
from collections.abc import Callable

import pytest
from conveyor_server.store.contract import (
    Behind,
    Exists,
    Fenced,
    Missing,
    Outcome,
    Record,
    StateStore,
    StoreUnavailable,
)
from store_calls import LATER_S, add, checkpoint, claim, creation, put, read

BIG = 2**53 - 1
ALPHABET = string.ascii_letters + string.digits + "._:-"


# ------------------------------------------------------------ create


def test_a_new_record_is_what_was_given_at_epoch_1(store: StateStore) -> None:
    expires = time.time() + 100
    assert store.create([creation("a", seq=7, expires_at=expires)]) == [None]
    assert read(store) == Record("a", 1, 7, b"head", b"body", "first", "cpu", pytest.approx(expires, abs=0.0011))


@pytest.mark.parametrize("size", [0, 1, 256, 2100, 1 << 20])
def test_bytes_come_back_as_they_were_given(store: StateStore, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    add(store, "a", head=data, body=data)
    assert read(store)[3:5] == (data, data)
    again = data[::-1]
    assert put(store, "a", 1, 1, again, heads={0: again}) is Outcome.DONE
    assert read(store)[3:5] == (again, again)
    [taken] = store.take([claim()])
    assert isinstance(taken, Record)
    assert taken[3:5] == (again, again)


def test_bytes_of_a_batch_go_to_their_own_records(store: StateStore) -> None:
    sizes = [3, 0, 2100, 1, 0, 70_000]
    names = [f"s{index}" for index in range(len(sizes))]
    first = [bytes([index]) * size for index, size in enumerate(sizes)]
    later = [bytes([16 + index]) * size for index, size in enumerate(reversed(sizes))]
    heads = [name.encode() * index for index, name in enumerate(names)]
    made = [creation(name, head=head, body=body) for name, head, body in zip(names, heads, first, strict=True)]
    assert store.create(made) == [None] * len(sizes)
    assert [(found.head, found.body) for found in store.load([(name, 0) for name in names])] == [
        *zip(heads, first, strict=True)
    ]
    rows = [(name, 1, 1, body) for name, body in zip(names, later, strict=True)]
    assert store.put(checkpoint(*rows)) == [Outcome.DONE] * len(sizes)
    assert [found.body for found in store.load([(name, 0) for name in names])] == later
    assert [found.body for found in store.take([claim(name) for name in names])] == later


@pytest.mark.parametrize("name", [ALPHABET, ALPHABET[::-1] + "a" * (128 - len(ALPHABET)), "-", ".", ":", "0"])
def test_an_id_is_any_allowed_one(store: StateStore, name: str) -> None:
    add(store, name)
    assert put(store, name, 1, 1) is Outcome.DONE
    assert read(store, name).session_id == name
    assert [record.session_id for record in store.listed("", 5, "m").records] == [name]
    assert store.delete([(name, 1)]) == [Outcome.DONE]


def test_an_id_that_is_taken_exists(store: StateStore) -> None:
    add(store, "a")
    assert store.create([creation(owner="other", body=b"theirs")]) == [Exists()]
    assert store.create([creation(head=b"other", body=b"theirs")]) == [Exists()]
    assert read(store).body == b"body"


def test_a_creation_that_is_repeated_is_ours_and_changes_nothing(store: StateStore) -> None:
    add(store, "a")
    put(store, "a", 1, 3, owner="first")
    assert store.create([creation()]) == [None]
    assert read(store)[1:5] == (1, 3, b"head", b"new")
    assert store.count() == 1


def test_a_creation_that_is_repeated_after_somebody_took_it_exists(store: StateStore) -> None:
    add(store, "a")
    store.take([claim(owner="first")])
    assert store.create([creation()]) == [Exists()]


def test_creations_of_a_batch_are_answered_one_by_one(store: StateStore) -> None:
    add(store, "b", owner="other")
    assert store.create([creation("a"), creation("b"), creation("c")]) == [None, Exists(), None]
    assert store.count() == 3


# ------------------------------------------------------------ take


def test_whoever_takes_a_session_has_the_next_epoch(store: StateStore) -> None:
    add(store, "a", seq=4)
    expires = time.time() + 100
    [first] = store.take([claim(expires_at=expires)])
    assert first == Record("a", 2, 4, b"head", b"body", "second", "cpu", pytest.approx(expires, abs=0.0011))
    assert read(store) == first
    [second] = store.take([claim(owner="third")])
    assert isinstance(second, Record)
    assert (second.epoch, second.owner) == (3, "third")


def test_what_is_not_there_cannot_be_taken(store: StateStore) -> None:
    assert store.take([claim()]) == [Missing()]


def test_a_claim_bears_no_epoch_above_its_most(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    assert store.take([claim(max_epoch=1)]) == [Fenced(2)]
    assert read(store)[1:7] == (2, 0, b"head", b"body", "second", "cpu")
    [taken] = store.take([claim(max_epoch=2)])
    assert isinstance(taken, Record)
    assert taken.epoch == 3


def test_a_claimant_that_has_the_body_is_not_given_it(store: StateStore) -> None:
    add(store, "a")
    [taken] = store.take([claim(known_epoch=1)])
    assert isinstance(taken, Record)
    assert (taken.epoch, taken.head, taken.body) == (2, b"head", b"")
    assert read(store).body == b"body"


def test_a_claimant_that_has_an_older_body_is_given_it(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    [taken] = store.take([claim(known_epoch=1)])
    assert isinstance(taken, Record)
    assert taken.body == b"body"


def test_a_claim_waits_for_the_last_owners_write(store: StateStore) -> None:
    add(store, "a", seq=4)
    assert store.take([claim(min_seq=5)]) == [Behind(4)]
    assert read(store).epoch == 1
    assert put(store, "a", 1, 5) is Outcome.DONE
    [taken] = store.take([claim(min_seq=5)])
    assert isinstance(taken, Record)
    assert taken[1:5] == (2, 5, b"head", b"new")


def test_a_claim_that_is_fenced_is_not_told_that_it_is_behind(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    assert store.take([claim(max_epoch=1, min_seq=9)]) == [Fenced(2)]


def test_claims_of_a_batch_are_answered_one_by_one(store: StateStore) -> None:
    add(store, "a", "b", "c", "d")
    store.take([claim("b")])
    answers = store.take(
        [claim("none"), claim("a"), claim("b", max_epoch=1), claim("c", min_seq=1), claim("d", known_epoch=1)]
    )
    assert [type(answer) for answer in answers] == [Missing, Record, Fenced, Behind, Record]
    assert [answer.body for answer in answers if isinstance(answer, Record)] == [b"body", b""]
    assert [found.epoch for found in store.load([(name, 0) for name in "abcd"])] == [2, 2, 1, 2]


@pytest.mark.parametrize("late", [0, 1])
def test_claims_are_not_done_when_it_is_too_late_for_one_of_them(store: StateStore, late: int) -> None:
    add(store, "a", "b")
    claims = [claim("a"), claim("b")]
    claims[late] = claim(claims[late].session_id, not_after=time.monotonic() - 1)
    with pytest.raises(StoreUnavailable):
        store.take(claims)
    assert [read(store, name)[1:6] for name in "ab"] == [(1, 0, b"head", b"body", "first")] * 2


def test_a_claim_is_done_when_it_is_not_too_late(store: StateStore) -> None:
    add(store, "a")
    [taken] = store.take([claim(not_after=time.monotonic() + 60)])
    assert isinstance(taken, Record)


# ------------------------------------------------------------ load


def test_a_record_is_loaded_at_its_epoch_or_at_any(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    answers = store.load([("a", 1), ("a", 2), ("a", 3), ("a", 0), ("none", 0), ("none", 1)])
    assert [type(answer) for answer in answers] == [Fenced, Record, Fenced, Record, Missing, Missing]
    assert answers[0] == Fenced(2)
    assert answers[1] == answers[3]


def test_loading_changes_nothing(store: StateStore) -> None:
    add(store, "a")
    before = read(store)
    assert read(store) == before
    assert put(store, "a", 1, 1) is Outcome.DONE


# ------------------------------------------------------------ put


def test_a_write_changes_what_it_has_and_nothing_else(store: StateStore) -> None:
    add(store, "a", "b")
    expires = time.time() + 50
    assert put(store, "a", 1, 9, expires_at=expires) is Outcome.DONE
    assert read(store) == Record("a", 1, 9, b"head", b"new", "writer", "tpu", pytest.approx(expires, abs=0.0011))
    assert read(store, "b")[1:7] == (1, 0, b"head", b"body", "first", "cpu")


def test_a_write_at_another_epoch_is_fenced(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    assert put(store, "a", 1, 9) is Outcome.FENCED
    assert put(store, "a", 3, 9) is Outcome.FENCED
    assert read(store)[1:6] == (2, 0, b"head", b"body", "second")


def test_what_is_not_there_cannot_be_written(store: StateStore) -> None:
    assert put(store, "a", 1, 1) is Outcome.MISSING
    assert store.count() == 0


@pytest.mark.parametrize("seq", [0, 4, 5])
def test_a_write_that_comes_late_is_done_without_being_written(store: StateStore, seq: int) -> None:
    add(store, "a")
    put(store, "a", 1, 5, b"five")
    before = read(store)
    assert put(store, "a", 1, seq, b"late", owner="late", runtime="late", expires_at=time.time() + 9) is Outcome.DONE
    assert read(store) == before


def test_another_head_is_written_where_the_seq_is_the_same(store: StateStore) -> None:
    add(store, "a", seq=5)
    assert put(store, "a", 1, 5, b"moved", heads={0: b"other"}) is Outcome.DONE
    assert read(store)[1:7] == (1, 5, b"other", b"moved", "writer", "tpu")


def test_another_head_is_not_written_over_a_later_seq(store: StateStore) -> None:
    add(store, "a", seq=5)
    assert put(store, "a", 1, 4, b"moved", heads={0: b"other"}) is Outcome.DONE
    assert read(store)[1:6] == (1, 5, b"head", b"body", "first")


def test_another_head_is_not_written_at_another_epoch(store: StateStore) -> None:
    add(store, "a")
    assert put(store, "a", 2, 4, b"moved", heads={0: b"other"}) is Outcome.FENCED
    assert read(store).head == b"head"


def test_heads_go_to_the_sessions_at_their_positions(store: StateStore) -> None:
    add(store, *"abcd")
    rows = [(name, 1, 0 if name == "b" else 1, b"new") for name in "abcd"]
    assert store.put(checkpoint(*rows, heads={3: b"of d", 1: b""})) == [Outcome.DONE] * 4
    assert [(found.head, found.body) for found in store.load([(name, 0) for name in "abcd"])] == [
        (b"head", b"new"),
        (b"", b"new"),
        (b"head", b"new"),
        (b"of d", b"new"),
    ]


def test_writes_of_a_batch_are_answered_one_by_one(store: StateStore) -> None:
    add(store, *"abcd")
    store.take([claim("b")])
    put(store, "d", 1, 7, b"seven")
    rows = [("none", 1, 1, b"0"), ("b", 1, 1, b"1"), ("a", 1, 1, b"2"), ("d", 1, 7, b"3"), ("c", 1, 1, b"4")]
    assert store.put(checkpoint(*rows)) == [
        Outcome.MISSING,
        Outcome.FENCED,
        Outcome.DONE,
        Outcome.DONE,
        Outcome.DONE,
    ]
    assert [found.body for found in store.load([(name, 0) for name in "abcd"])] == [b"2", b"body", b"4", b"seven"]


def test_an_empty_batch_is_no_trouble(store: StateStore) -> None:
    assert (store.create([]), store.take([]), store.load([]), store.put(checkpoint()), store.delete([])) == (
        [],
        [],
        [],
        [],
        [],
    )


def test_a_batch_may_have_thousands(store: StateStore) -> None:
    names = [f"session-{index}" for index in range(3000)]
    add(store, *names)
    assert store.put(checkpoint(*((name, 1, 1, name.encode()) for name in names))) == [Outcome.DONE] * 3000
    assert {taken.epoch for taken in store.take([claim(name) for name in names])} == {2}
    assert [found.body.decode() for found in store.load([(name, 2) for name in names])] == names
    assert store.delete([(name, 2) for name in names]) == [Outcome.DONE] * 3000


def test_seqs_and_epochs_are_exact_up_to_the_largest(store: StateStore, set_epoch: Callable[[str, int], None]) -> None:
    add(store, "a", "b", seq=BIG - 1)
    set_epoch("a", BIG - 1)
    assert store.load([("a", BIG - 2)]) == [Fenced(BIG - 1)]
    assert store.take([claim(max_epoch=BIG - 2)]) == [Fenced(BIG - 1)]
    assert store.take([claim(min_seq=BIG)]) == [Behind(BIG - 1)]
    assert put(store, "a", BIG - 1, BIG) is Outcome.DONE
    [taken] = store.take([claim(max_epoch=BIG - 1, known_epoch=BIG - 2, min_seq=BIG)])
    assert isinstance(taken, Record)
    assert taken[1:5] == (BIG, BIG, b"head", b"new")
    assert put(store, "a", BIG - 1, BIG) is Outcome.FENCED
    assert put(store, "b", 1, BIG, b"last") is Outcome.DONE
    assert read(store, "b")[2:5] == (BIG, b"head", b"last")
    assert store.delete([("a", BIG - 1)]) == [Outcome.FENCED]
    assert store.delete([("a", BIG)]) == [Outcome.DONE]


# ------------------------------------------------------------ delete


def test_only_the_owner_deletes(store: StateStore) -> None:
    add(store, *"abc")
    store.take([claim("b")])
    assert store.delete([("a", 1), ("b", 1), ("none", 1), ("c", 2)]) == [
        Outcome.DONE,
        Outcome.FENCED,
        Outcome.MISSING,
        Outcome.FENCED,
    ]
    assert [type(found) for found in store.load([(name, 0) for name in "abc"])] == [Missing, Record, Record]
    assert store.count() == 2


def test_a_deleted_session_is_not_written_and_its_id_is_free(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    store.delete([("a", 2)])
    assert put(store, "a", 2, 9) is Outcome.MISSING
    assert store.delete([("a", 2)]) == [Outcome.MISSING]
    add(store, "a", body=b"another")
    assert read(store)[1:5] == (1, 0, b"head", b"another")


# ------------------------------------------------------------ what it is


def test_a_store_says_what_it_is(store: StateStore) -> None:
    assert store.name.startswith(("memory", "sqlite:", "valkey://"))
    assert store.shared == (store.name != "memory")


def test_an_expiry_without_end_is_far_away(store: StateStore) -> None:
    add(store, "a", expires_at=float("inf"))
    assert put(store, "a", 1, 1, expires_at=float("inf")) is Outcome.DONE
    assert read(store).expires_at > time.time() + 1000 * LATER_S
