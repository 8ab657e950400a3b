"""The open loop's goals, from results that nobody measured: each can be met, and each can be missed."""

import numpy as np
import pytest
from conveyor.bench import LoadResult
from conveyor.bench.histogram import Histogram

from benchmarks.open_loop import SHARES, forms, judge, judge_refusals, refusals

PEAK = 1000.0
FORM = forms(4)[1]
# The goals, in their order.
LOW, HIGH, ANSWERED, OVER, EXCESS = range(5)


def took(*values_ms):
    made = Histogram()
    made.record((np.array(values_ms) * 1e6).astype(np.int64))
    return made


def result(p99_ms=1.0, *, steps=1000, **more):
    """A second in which that many steps were answered, all but two of a hundred within half the time."""
    latency = took(*[p99_ms / 2] * 98, p99_ms, p99_ms)
    return LoadResult(elapsed_s=1.0, steps=steps, latency=latency, **more)


def verdicts(**by_goal):
    """Of results that meet all goals but for what is given: `low`, `high`, `over`."""
    results = dict(zip(SHARES, (by_goal.get(name, result()) for name in ("low", "high", "over")), strict=True))
    return judge(FORM, PEAK, results)


def missed(**by_goal):
    return [index for index, goal in enumerate(verdicts(**by_goal)) if not goal.met]


def test_all_goals_can_be_met():
    goals = verdicts(low=result(2.9), high=result(14.8), over=result(14.8, steps=900, shed=300))
    assert [str(goal)[:5] for goal in goals] == ["PASS "] * 5
    for goal, share in zip(goals, ("55%", "80%", "120%", "120%", "120%"), strict=True):
        assert f"4 streams on 4 connections at {share}" in goal.text


@pytest.mark.parametrize(
    ("by_goal", "expected"),
    [
        ({"low": result(3.1)}, [LOW]),
        ({"high": result(15.2)}, [HIGH]),
        # The excess alone may be refused.
        ({"low": result(refused={"OVERLOADED": took(1)})}, [LOW]),
        ({"high": result(refused={"OVERLOADED": took(1)})}, [HIGH]),
        ({"over": result(steps=899)}, [ANSWERED]),
        ({"over": result(15.2)}, [OVER]),
        ({"over": result(unsent=1)}, [EXCESS]),
        ({"low": result(9.0), "over": result(20.0, steps=500, unsent=7)}, [LOW, ANSWERED, OVER, EXCESS]),
        # What waited in the client is in the latencies.
        ({"low": result(unsent=1), "high": result(unsent=1)}, []),
    ],
)
def test_each_goal_is_missed_by_itself(by_goal, expected):
    assert missed(**by_goal) == expected
    goals = verdicts(**by_goal)
    assert [str(goal).startswith("below") for goal in goals] == [index in expected for index in range(5)]


def test_the_slowest_of_a_hundred_is_no_p99():
    latency = took(*[1.0] * 199, 1000.0)
    assert missed(low=LoadResult(elapsed_s=1.0, steps=200, latency=latency)) == []


@pytest.mark.parametrize(
    ("over", "met"),
    [
        ({}, True),
        ({"shed": 10_000}, True),
        ({"refused": {"OVERLOADED": took(1, 49), "CREDIT_EXCEEDED": took(2), "STEP_ABORTED": took(3)}}, True),
        ({"refused": {"OVERLOADED": took(*[1] * 999, 51)}}, False),
        ({"refused": {"OVERLOADED": took(1), "STEP_ABORTED": took(60)}}, False),
        ({"refused": {"OVERLOADED": took(1), "STEP_TIMEOUT": took(1)}}, False),
        ({"unsent": 1}, False),
    ],
)
def test_what_is_not_answered_is_known_not_to_be_in_time(over, met):
    goal = judge_refusals(FORM, result(**over))
    assert goal.met is met
    assert ("STEP_TIMEOUT" in goal.text) == ("STEP_TIMEOUT" in over.get("refused", {}))


def test_the_excess_is_told_by_who_turned_it_away():
    goal = judge_refusals(FORM, result(shed=1234, refused={"OVERLOADED": took(1, 2), "STEP_ABORTED": took(40)}))
    assert "1,234 steps turned away by their session's credit" in goal.text
    assert "3 by the server" in goal.text
    assert "max 40." in goal.text


def test_refusals_of_all_reasons_are_one_histogram():
    together = refusals(result(refused={"OVERLOADED": took(1, 2), "STEP_ABORTED": took(3)}))
    assert together.count == 3
    assert together.max_ns == 3e6
    assert refusals(result()).count == 0


def test_both_forms_put_all_sessions_on_and_one_of_them_in_frames():
    gateway, streams = forms(256)
    assert (gateway.spec.frames, gateway.spec.streams, streams.spec.frames, streams.spec.streams) == (
        True,
        1,
        False,
        256,
    )
    assert gateway.spec.sessions == streams.spec.sessions == 256
    assert forms(1)[1].spec.connections == 1
