"""Slots by the hundred, and the lanes that hold them."""

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_server.engine.lanes import Lane, Lanes
from conveyor_server.slab import SlotPool
from hypothesis import given


def test_a_new_pool_gives_its_lowest_slots_first():
    pool = SlotPool(5)
    assert sorted(pool.acquire_many(3).tolist()) == [0, 1, 2]
    assert (pool.free, pool.acquire(), pool.acquire()) == (2, 3, 4)


def test_more_than_there_are_is_refused_and_takes_none():
    pool = SlotPool(3)
    pool.acquire()
    with pytest.raises(IndexError, match="3 slots are wanted and 2 of 3 are free"):
        pool.acquire_many(3)
    assert pool.free == 2


def test_what_was_acquired_stays_as_it_was_when_others_are_released():
    pool = SlotPool(6)
    mine, others = pool.acquire_many(2), pool.acquire_many(2)
    kept = mine.tolist()
    pool.release_many(others[::-1])
    pool.acquire_many(3)
    assert mine.tolist() == kept


def test_none_at_all():
    pool = SlotPool(1)
    assert pool.acquire_many(0).tolist() == []
    pool.release_many(np.empty(0, np.int64))
    pool.check([])


@given(st.lists(st.integers(-4, 4), max_size=40))
def test_a_slot_has_one_holder(history):
    pool, held = SlotPool(12), []
    for count in history:
        if count > 0 and count <= pool.free:
            taken = pool.acquire_many(count).tolist() if count > 1 else [pool.acquire()]
            assert not set(taken) & set(held)
            held += taken
        elif count < 0:
            back, held = held[:-count], held[-count:]
            if len(back) == 1:
                pool.release(back[0])
            else:
                pool.release_many(np.array(back, np.int64))
        pool.check(held)


@pytest.mark.parametrize("held", [[0], [0, 2], [0, 0], [0, 1, 2]], ids=["lost", "free", "twice", "too many"])
def test_a_slot_that_is_not_where_it_should_be_is_noticed(held):
    pool = SlotPool(4)
    pool.acquire_many(2)
    pool.check([0, 1])
    with pytest.raises(AssertionError):
        pool.check(held)


def test_lanes_are_fresh_until_they_hold_a_slot():
    lanes = Lanes(4)
    one, two = Lane(lanes, 1), Lane(lanes, 2)
    assert (one.slot, two.slot) == (None, None)
    one.slot = 0
    two.slot = 7
    assert (one.slot, two.slot, Lane(lanes, 1).slot) == (0, 7, 0)
    assert lanes.held.tolist() == [0, 1, 8, 0]
    one.slot = None
    assert lanes.held.tolist() == [0, 0, 8, 0]
