"""What is expected of a run: what runs of its size took, else no less than it can take."""

import math

import pytest
from conveyor_server.engine.run_times import RunTimes, at_most_s

US = 1e-6


def test_light_load_does_not_make_a_queue_look_long():
    times = RunTimes({(1, 1): 40 * US, (256, 1): 256 * 5 * US})
    for _ in range(1000):
        times.observe(1, 1, 1, 50 * US)
    assert times.time_step_s == pytest.approx(5 * US)
    assert times.expected_s(1, 1) == pytest.approx(50 * US, rel=0.01)
    assert times.expected_s(256, 1) == times.expected_s(129, 1) == pytest.approx(256 * 5 * US)


def test_a_size_that_was_never_run_is_bounded_by_its_neighbours():
    times = RunTimes({(1, 1): 30 * US, (8, 1): 70 * US, (32, 1): 200 * US, (1, 16): 400 * US})
    assert times.expected_s(2, 1) == pytest.approx(60 * US), "two runs of one"
    assert times.expected_s(4, 1) == pytest.approx(70 * US), "no longer than eight rows"
    assert times.expected_s(9, 1) == pytest.approx(140 * US), "two runs of eight, for it may be sixteen"
    assert times.expected_s(200, 1) == pytest.approx(8 * 200 * US)
    assert times.expected_s(1, 2) == pytest.approx(60 * US)
    assert times.expected_s(1, 9) == pytest.approx(400 * US)
    assert times.expected_s(2, 32) == pytest.approx(4 * 400 * US)


def test_what_was_run_goes_before_what_can_be_concluded():
    times = RunTimes({(1, 1): 30 * US, (8, 1): 70 * US})
    times.observe(3, 1, 3, 500 * US)
    assert times.expected_s(4, 1) == pytest.approx(500 * US)


def test_nothing_is_known_before_the_first_run():
    times = RunTimes()
    assert times.expected_s(1, 1) == math.inf
    assert times.time_step_s == 0.0
    assert at_most_s({}, 1, 1) == math.inf
    times.observe(1, 1, 1, 30 * US)
    assert times.expected_s(2, 2) == pytest.approx(120 * US)


def test_a_process_that_stood_still_tells_nothing_of_the_model():
    times = RunTimes({(1, 1): 30 * US, (256, 1): 256 * 5 * US})
    times.observe(256, 1, 256, 4.0)
    assert times.expected_s(256, 1) < 2 * 256 * 5 * US
    times.observe(64, 1, 64, 4.0)
    assert times.expected_s(64, 1) <= 32 * 256 * 5 * US
    for _ in range(60):
        times.observe(256, 1, 256, 0.1)
    assert times.expected_s(256, 1) == pytest.approx(0.1, rel=0.01), "one that is that slow is believed in the end"
