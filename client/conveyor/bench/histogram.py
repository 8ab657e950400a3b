"""Latencies, counted in buckets whose width is under 0.8 % of their value, whatever the value (as HdrHistogram does).

Invariant: a value is counted once and never sampled; histograms of several processes add up to the histogram of all
their values.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Nanoseconds: TypeAlias = NDArray[np.int64]

# Each power of two has 2^7 buckets, so a bucket is at most 1/128 of its value wide.
_SUB_BITS = 7
_SUB = 1 << _SUB_BITS
# Values of up to 2^45 ns, 9 hours; what is longer counts there.
_OCTAVES = 45 - _SUB_BITS
_BUCKETS = _SUB * (_OCTAVES + 1)
_FOLD_AT = 1 << 15


@dataclass(frozen=True, slots=True)
class Percentiles:
    """What a histogram says, in seconds; all 0 where nothing was recorded."""

    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float
    mean_s: float


class Histogram:
    """Counts of durations in nanoseconds. Belongs to one thread."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BUCKETS, np.int64)
        self._pending: list[Nanoseconds] = []
        self._waiting = 0
        self._largest = 0
        self._total = 0.0

    def record(self, values: Nanoseconds) -> None:
        """Counts durations `[n]` in nanoseconds; below 0 counts as 0. The array must not be changed afterwards."""
        # Many small arrays are folded together: an array operation costs as much for 1 value as for 100.
        self._pending.append(values)
        self._waiting += values.size
        if self._waiting >= _FOLD_AT or len(self._pending) >= 4096:
            self._fold()

    @property
    def count(self) -> int:
        """Values recorded."""
        self._fold()
        return int(self._counts.sum())

    @property
    def max_ns(self) -> int:
        """The largest value, exactly."""
        self._fold()
        return self._largest

    def quantile_ns(self, share: float) -> int:
        """The value that `share` (0 to 1) of all values are at or below, to within a bucket; 0: nothing recorded."""
        self._fold()
        total = int(self._counts.sum())
        if not total:
            return 0
        rank = min(total, max(1, int(np.ceil(share * total))))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(int(upper_edges()[bucket]), self._largest)

    def percentiles(self) -> Percentiles:
        """The usual ones, in seconds."""
        count = self.count
        p50, p90, p99, p999 = (self.quantile_ns(share) / 1e9 for share in (0.5, 0.9, 0.99, 0.999))
        return Percentiles(p50, p90, p99, p999, self._largest / 1e9, self._total / count / 1e9 if count else 0.0)

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For a plot: shares `[n]` rising to 1, and the seconds `[n]` that so many values are at or below."""
        self._fold()
        used = np.flatnonzero(self._counts)
        shares = np.cumsum(self._counts[used]) / max(1, self._counts.sum())
        return shares, np.minimum(upper_edges()[used], self._largest) / 1e9

    def add(self, other: "Histogram") -> None:
        """Takes over all values of another histogram."""
        other._fold()
        self._fold()
        self._counts += other._counts
        self._largest = max(self._largest, other._largest)
        self._total += other._total

    def to_json(self) -> dict[str, Any]:
        """Bucket upper edges in nanoseconds and counts, of buckets that hold something."""
        self._fold()
        used = np.flatnonzero(self._counts)
        return {"upper_ns": upper_edges()[used].tolist(), "counts": self._counts[used].tolist(), "max_ns": self.max_ns}

    def _fold(self) -> None:
        if not self._pending:
            return
        values = np.maximum(np.concatenate(self._pending), 0)
        self._pending.clear()
        self._waiting = 0
        if values.size:
            self._counts += np.bincount(bucket_of(values), minlength=_BUCKETS)
            self._largest = max(self._largest, int(values.max()))
            self._total += float(values.sum())


def bucket_of(values: Nanoseconds) -> NDArray[np.int64]:
    """The bucket `[n]` of each value `[n]` of 0 or more."""
    # frexp gives the power of two above the value: below 2^7 the bucket is the value itself.
    exponent = np.maximum(np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1 - _SUB_BITS, 0)
    buckets: NDArray[np.int64] = np.minimum(exponent * _SUB + (values >> exponent), _BUCKETS - 1)
    return buckets


def upper_edges() -> NDArray[np.int64]:
    """The largest value `[buckets]` of each bucket."""
    index = np.arange(_BUCKETS, dtype=np.int64)
    exponent = np.maximum(index // _SUB - 1, 0)
    edges: NDArray[np.int64] = ((index - exponent * _SUB + 1) << exponent) - 1
    return edges
