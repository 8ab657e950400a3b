"""What is counted, listed and let go of: quotas, pages, expiry. For each store."""

import time
from collections.abc import Callable

import pytest
from conveyor_server.store.contract import (
    Exists,
    Missing,
    Outcome,
    Quota,
    QuotaFull,
    Record,
    StateStore,
)
from store_calls import LATER_S, add, checkpoint, claim, creation, put, quotas, read

SOON_S = 0.06
PassBy = Callable[[float], None]


# ------------------------------------------------------------ quotas


def test_a_quota_that_is_used_up_refuses_the_next(store: StateStore) -> None:
    add(store, "a", "b", quotas=quotas(tenant=2))
    assert store.create([creation("c", quotas=quotas(tenant=2))]) == [QuotaFull(Quota("tenant:t", 2))]
    assert store.load([("c", 0)]) == [Missing()]
    assert store.create([creation("c", quotas=quotas(tenant=3))]) == [None]


def test_a_quota_fills_up_within_a_batch(store: StateStore) -> None:
    made = [creation(name, quotas=quotas(all=2)) for name in "abc"]
    assert store.create(made) == [None, None, QuotaFull(Quota("", 2))]
    assert store.count() == 2


def test_a_quota_of_nothing_is_no_bound(store: StateStore) -> None:
    add(store, *"abcdef", quotas=quotas(all=0, model=0, tenant=0))
    assert store.count() == 6


def test_the_first_quota_that_is_full_is_named(store: StateStore) -> None:
    add(store, "a", quotas=quotas(all=1, model=1, tenant=1))
    full = store.create([creation("b", quotas=quotas(tenant=1, model=1, all=1))])
    assert full == [QuotaFull(Quota("tenant:t", 1))]
    full = store.create([creation("b", quotas=quotas(all=5, model=1, tenant=1))])
    assert full == [QuotaFull(Quota("model:m", 1))]


def test_records_count_where_their_kind_was_not_bounded(store: StateStore) -> None:
    add(store, "a", quotas=quotas(tenant=0))
    assert store.create([creation("b", quotas=quotas(tenant=1))]) == [QuotaFull(Quota("tenant:t", 1))]
    assert store.create([creation("b", quotas=quotas(model=1))]) == [QuotaFull(Quota("model:m", 1))]
    assert store.create([creation("b", quotas=quotas(all=1))]) == [QuotaFull(Quota("", 1))]


def test_a_record_that_expired_long_ago_does_not_count_for_the_next_of_its_name(store: StateStore) -> None:
    add(store, "a", quotas=quotas(model=1, tenant=1))
    # So long ago that a store may have let go of it by itself.
    store.take([claim("a", expires_at=time.time() - 20_000)])
    add(store, "a", model="other", quotas=[Quota("tenant:u", 1)])
    assert store.listed("", 10, "m").total == 0
    assert [record.session_id for record in store.listed("", 10, "other").records] == ["a"]
    assert store.create([creation("b", quotas=quotas(model=1, tenant=1))]) == [None]
    assert store.create([creation("c", model="other", quotas=[Quota("tenant:u", 1)])]) == [
        QuotaFull(Quota("tenant:u", 1))
    ]


def test_records_of_another_kind_do_not_count(store: StateStore) -> None:
    add(store, "a", model="other", quotas=[Quota("tenant:u", 0)])
    add(store, "b", quotas=quotas(model=1, tenant=1))


def test_a_refused_session_counts_against_nothing(store: StateStore) -> None:
    add(store, "a", quotas=quotas(model=1))
    assert store.create([creation("b", quotas=quotas(tenant=1, model=1))]) == [QuotaFull(Quota("model:m", 1))]
    add(store, "c", model="other", quotas=quotas(tenant=1))


def test_a_creation_that_is_repeated_is_not_counted_again(store: StateStore) -> None:
    add(store, "a", quotas=quotas(tenant=1))
    assert store.create([creation("a", quotas=quotas(tenant=1))]) == [None]
    assert store.create([creation("b", quotas=quotas(tenant=2))]) == [None]


def test_a_session_that_was_taken_and_written_counts_once_until_it_is_deleted(store: StateStore) -> None:
    one = quotas(all=1, model=1, tenant=1)
    add(store, "a", quotas=one)
    store.take([claim()])
    put(store, "a", 2, 1, heads={0: b"other"})
    assert store.create([creation("b", quotas=one)]) == [QuotaFull(Quota("", 1))]
    assert store.delete([("a", 2)]) == [Outcome.DONE]
    add(store, "b", quotas=one)


def test_a_session_that_expires_counts_no_more(store: StateStore, pass_by: PassBy) -> None:
    one = quotas(all=1, model=1, tenant=1)
    add(store, "a", quotas=one, expires_at=(gone := time.time() + SOON_S))
    pass_by(gone)
    add(store, "b", quotas=one)
    assert store.create([creation("c", quotas=one)]) == [QuotaFull(Quota("", 1))]


def test_a_session_whose_expiry_moved_on_still_counts(store: StateStore, pass_by: PassBy) -> None:
    one = quotas(all=1, model=1, tenant=1)
    add(store, "a", quotas=one, expires_at=(gone := time.time() + SOON_S))
    put(store, "a", 1, 1)
    pass_by(gone)
    for kind in ("all", "model", "tenant"):
        [full] = store.create([creation("b", quotas=quotas(**{kind: 1}))])
        assert isinstance(full, QuotaFull)
    assert store.sweep(time.time()) == 0
    assert (store.count(), store.listed("", 9, "m").total) == (1, 1)


# ------------------------------------------------------------ expiry


def test_nobody_is_shown_what_has_expired(store: StateStore, pass_by: PassBy) -> None:
    add(store, "a", expires_at=(gone := time.time() + SOON_S))
    add(store, "b")
    pass_by(gone)
    assert store.load([("a", 0), ("a", 1)]) == [Missing(), Missing()]
    assert store.take([claim()]) == [Missing()]
    assert put(store, "a", 1, 1) is Outcome.MISSING
    assert store.delete([("a", 1)]) == [Outcome.MISSING]
    assert [record.session_id for record in store.listed("", 9, "").records] == ["b"]
    assert (store.listed("", 9, "m").total, store.count()) == (1, 1)


def test_an_id_that_has_expired_is_free(store: StateStore, pass_by: PassBy) -> None:
    add(store, "a", seq=5, expires_at=(gone := time.time() + SOON_S))
    pass_by(gone)
    assert store.create([creation("a", owner="other", body=b"another", seq=2)]) == [None]
    assert read(store)[1:6] == (1, 2, b"head", b"another", "other")
    assert store.count() == 1
    assert store.create([creation("a")]) == [Exists()]


@pytest.mark.parametrize("how", ["put", "take"])
def test_an_expiry_that_moved_on_is_what_counts(store: StateStore, pass_by: PassBy, how: str) -> None:
    add(store, "a", expires_at=(gone := time.time() + SOON_S))
    if how == "put":
        put(store, "a", 1, 1)
    else:
        store.take([claim()])
    pass_by(gone)
    assert read(store).expires_at > gone + LATER_S / 2


@pytest.mark.parametrize("how", ["put", "take"])
def test_an_expiry_that_came_nearer_is_what_counts(store: StateStore, pass_by: PassBy, how: str) -> None:
    add(store, "a")
    gone = time.time() + SOON_S
    if how == "put":
        put(store, "a", 1, 1, expires_at=gone)
    else:
        store.take([claim(expires_at=gone)])
    pass_by(gone)
    assert store.load([("a", 0)]) == [Missing()]
    assert store.count() == 0
    assert store.sweep(time.time()) <= 1


@pytest.mark.parametrize("ago_s", [1, 10 * LATER_S])
def test_what_is_written_with_a_moment_of_the_past_is_gone(store: StateStore, ago_s: float) -> None:
    add(store, *"abc")
    past = time.time() - ago_s
    assert put(store, "a", 1, 1, expires_at=past) is Outcome.DONE
    [taken] = store.take([claim("b", expires_at=past)])
    assert isinstance(taken, Record)
    assert store.create([creation("d", expires_at=past)]) == [None]
    assert store.load([("a", 0), ("b", 0), ("d", 0)]) == [Missing()] * 3
    assert [record.session_id for record in store.listed("", 9, "").records] == ["c"]
    assert store.count() == 1


# ------------------------------------------------------------ sweep


def test_a_sweep_removes_what_has_expired_by_its_moment(store: StateStore) -> None:
    now = time.time()
    add(store, "a", "b", expires_at=now + 100)
    add(store, "c", expires_at=now + 200)
    assert store.sweep(now + 99) == 0
    assert store.sweep(now + 101) == 2
    assert store.sweep(now + 101) == 0
    assert [type(found) for found in store.load([(name, 0) for name in "abc"])] == [Missing, Missing, Record]


def test_a_sweep_goes_by_the_last_expiry(store: StateStore) -> None:
    now = time.time()
    add(store, *"abc", expires_at=now + 100)
    put(store, "a", 1, 1, expires_at=now + 300)
    store.take([claim("b", expires_at=now + 300)])
    assert store.sweep(now + 200) == 1
    assert store.count() == 2
    put(store, "a", 1, 2, expires_at=now + 50)
    assert store.sweep(now + 60) == 1
    assert store.sweep(now + 299) == 0
    assert store.sweep(now + 301) == 1
    assert store.count() == 0


# ------------------------------------------------------------ pages


def test_pages_are_in_the_order_of_ids_and_have_no_bodies(store: StateStore) -> None:
    add(store, "b", "a.1", "a-1", "a:1", "A", "_", "9", seq=3)
    page = store.listed("", 10, "")
    assert [record.session_id for record in page.records] == sorted(["b", "a.1", "a-1", "a:1", "A", "_", "9"])
    assert {(record.head, record.body, record.seq) for record in page.records} == {(b"head", b"", 3)}
    assert (page.more, page.total) == (False, 7)


def test_a_page_begins_behind_an_id_and_ends_at_its_limit(store: StateStore) -> None:
    add(store, *"abcde")
    seen, after = [], ""
    while True:
        page = store.listed(after, 2, "")
        seen += [record.session_id for record in page.records]
        assert page.total == 5
        if not page.more:
            break
        after = seen[-1]
    assert seen == list("abcde")
    assert [record.session_id for record in store.listed("bb", 2, "").records] == ["c", "d"]
    assert store.listed("e", 2, "") == type(page)([], more=False, total=5)


@pytest.mark.parametrize(("limit", "more"), [(4, True), (5, False), (6, False)])
def test_a_page_says_whether_others_follow(store: StateStore, limit: int, more: bool) -> None:
    add(store, *"abcde")
    page = store.listed("", limit, "")
    assert (len(page.records), page.more) == (min(limit, 5), more)


def test_a_page_of_one_model_has_its_sessions_only(store: StateStore) -> None:
    add(store, "a", "c", "e", model="m")
    add(store, "b", "d", model="n")
    page = store.listed("a", 1, "m")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["c"], True, 3)
    page = store.listed("", 9, "n")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["b", "d"], False, 2)
    assert store.listed("", 9, "none").total == 0


def test_a_page_of_one_tenant_has_its_sessions_only(store: StateStore) -> None:
    add(store, "acme/a", "acme/c", "acme0/b", "acm/e", "acme", "acme-/x", "b", model="m")
    add(store, "acme/b", model="n")
    page = store.listed("", 2, "", "acme")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["acme/a", "acme/b"], True, 3)
    page = store.listed("acme/b", 2, "", "acme")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["acme/c"], False, 3)
    page = store.listed("", 9, "m", "acme")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["acme/a", "acme/c"], False, 2)
    # Whatever is asked for, it is none of another's.
    assert store.listed("zzz", 9, "", "acme").records == []
    assert [record.session_id for record in store.listed("acme", 9, "", "acme0").records] == ["acme0/b"]
    assert store.listed("", 9, "", "nobody") == type(page)([], more=False, total=0)
    assert store.listed("", 9, "").total == 8


def test_a_tenants_sessions_that_have_expired_are_not_on_its_page(
    store: StateStore, pass_by: Callable[[float], None]
) -> None:
    soon = time.time() + 0.05
    add(store, "acme/a", "acme/b", expires_at=soon)
    add(store, "acme/c")
    pass_by(soon)
    page = store.listed("", 9, "", "acme")
    assert ([record.session_id for record in page.records], page.total) == (["acme/c"], 1)


def test_a_page_is_what_the_records_are_now(store: StateStore) -> None:
    add(store, "a")
    store.take([claim()])
    store.put(checkpoint(("a", 2, 8, b"new"), heads={0: b"other"}))
    [record] = store.listed("", 9, "m").records
    assert record == read(store)._replace(body=b"")
    store.delete([("a", 2)])
    assert store.listed("", 9, "m").records == []


def test_expired_sessions_do_not_shorten_a_page(store: StateStore) -> None:
    add(store, "a", "c", expires_at=time.time() - 1)
    add(store, "b", "d", "e")
    page = store.listed("", 2, "")
    assert ([record.session_id for record in page.records], page.more, page.total) == (["b", "d"], True, 3)
