"""Latencies in buckets: no value is lost, percentiles are right to within a bucket, and processes add up."""

import numpy as np
import pytest
from conveyor.bench.histogram import Histogram, bucket_of, upper_edges
from hypothesis import given
from hypothesis import strategies as st

DURATIONS = st.lists(st.integers(0, 2**45 - 1), min_size=1, max_size=200)


@given(DURATIONS)
def test_a_bucket_is_narrow_and_holds_its_values(values):
    array = np.array(values, np.int64)
    upper = upper_edges()[bucket_of(array)]
    assert (upper >= array).all()
    assert (upper - array <= array / 128).all()


@given(DURATIONS, st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_percentiles_are_those_of_the_values_to_within_a_bucket(values, share):
    histogram = Histogram()
    histogram.record(np.array(values, np.int64))
    exact = sorted(values)[max(1, int(np.ceil(share * len(values)))) - 1]
    assert exact <= histogram.quantile_ns(share) <= exact + exact / 128
    assert histogram.max_ns == max(values)


@given(DURATIONS, DURATIONS)
def test_two_histograms_add_up_to_that_of_all_values(some, others):
    parts = [Histogram(), Histogram(), Histogram()]
    for histogram, values in zip(parts, (some, others, some + others), strict=True):
        for value in values:
            histogram.record(np.array([value], np.int64))
    parts[0].add(parts[1])
    assert parts[0].to_json() == parts[2].to_json()
    assert parts[0].percentiles().mean_s == pytest.approx(np.mean(some + others) / 1e9)


def test_nothing_recorded_is_nothing():
    found = Histogram().percentiles()
    assert (found.p50_s, found.p999_s, found.max_s, found.mean_s) == (0, 0, 0, 0)
    assert Histogram().count == 0


def test_many_small_arrays_are_all_counted():
    histogram = Histogram()
    for value in range(10_000):
        histogram.record(np.array([value, -5], np.int64))
    assert histogram.count == 20_000
    assert histogram.quantile_ns(0.5) == 0
    shares, seconds = histogram.curve()
    assert shares[-1] == 1
    assert (np.diff(shares) > 0).all()
    assert seconds[-1] == pytest.approx(9999e-9)
