"""Which steps are traced: one in so many, by chance, and never counted one by one."""

import random
from itertools import pairwise

import pytest
from conveyor_server.tracing import StepSampler


def test_all_and_none() -> None:
    assert StepSampler(1).take(3) == [0, 1, 2]
    none = StepSampler(0)
    assert [list(none.take(1_000)) for _ in range(3)] == [[], [], []]


def test_distances_are_kept_over_turns() -> None:
    drawn = iter((3, 1, 5, 4, 9))
    sampler = StepSampler(5, lambda longest: next(drawn))
    # The steps from 1: 3, 4, 9, 13, 22.
    assert [list(sampler.take(count)) for count in (2, 1, 0, 1, 4, 5, 3)] == [[], [0], [], [0], [], [0, 4], []]


@pytest.mark.parametrize("turn", [1, 7, 256])
def test_one_in_so_many_however_steps_come(turn: int) -> None:
    chance = random.Random(5)
    sampler = StepSampler(16, lambda longest: chance.randint(1, longest))
    steps = 160_000 - 160_000 % turn
    chosen = [first + index for first in range(0, steps, turn) for index in sampler.take(turn)]
    assert len(chosen) == pytest.approx(steps / 16, rel=0.03)
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert (min(gaps), max(gaps)) == (1, 31)
    # Nobody is met always or never: each place of a turn has its share.
    if turn > 1:
        shares = [sum(index % turn == place for index in chosen) for place in range(turn)]
        assert min(shares) > 0
