"""What happened between two metrics pages: increases and quantiles, as Prometheus makes them.

Invariant: a counter that fell was begun anew, by a server that was started again, and what it says now is its increase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from conveyor.cli.top.page import Labels, Page


@dataclass(frozen=True, slots=True)
class Change:
    """Two pages of one server.

    Attributes:
        before: the earlier one.
        after: the later one.
        seconds: between them, more than 0.
    """

    before: Page
    after: Page
    seconds: float

    def increase(self, name: str, **labels: str) -> float:
        """By how much all counters of that name with these labels rose."""
        return sum(
            self._rise(name, has, value)
            for has, value in self.after.series.get(name, {}).items()
            if labels.items() <= dict(has).items()
        )

    def rate(self, name: str, **labels: str) -> float:
        """The increase, in a second."""
        return self.increase(name, **labels) / self.seconds

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """How many values came that are at most each bound of a histogram, in their order; its last is infinity."""
        found: dict[float, float] = {}
        for has, value in self.after.series.get(f"{name}_bucket", {}).items():
            known = dict(has)
            if "le" in known and labels.items() <= known.items():
                bound = float(known["le"])
                found[bound] = found.get(bound, 0.0) + self._rise(f"{name}_bucket", has, value)
        return dict(sorted(found.items()))

    def _rise(self, name: str, labels: Labels, value: float) -> float:
        # A series that was not there counted from zero.
        before = self.before.series.get(name, {}).get(labels, 0.0)
        return value if value < before else value - before


def added(histograms: Sequence[dict[float, float]]) -> dict[float, float]:
    """Histograms of equal bounds as one: what several servers saw together."""
    whole: dict[float, float] = {}
    for buckets in histograms:
        for bound, count in buckets.items():
            whole[bound] = whole.get(bound, 0.0) + count
    return dict(sorted(whole.items()))


def quantile(share: float, buckets: dict[float, float]) -> float | None:
    """The value that this share of all values is at most, estimated as Prometheus' histogram_quantile does.

    Within a bucket, values are taken to lie evenly; the lowest bucket begins at 0; what exceeds every bound is taken to
    be the highest bound. https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile

    Args:
        share: from 0 to 1.
        buckets: upper bound, ascending and the last infinite, and how many values are at most that.

    Returns:
        None where no value came.
    """
    bounds, counts = list(buckets), list(buckets.values())
    if len(bounds) < 2 or not counts[-1]:
        return None
    rank = share * counts[-1]
    index = next(place for place, count in enumerate(counts) if count >= rank)
    if index == len(bounds) - 1:
        return bounds[-2]
    low, below = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0.0)
    within = counts[index] - below
    return bounds[index] if not within else low + (bounds[index] - low) * (rank - below) / within


def shares(buckets: dict[float, float]) -> dict[float, float]:
    """The share of all values in each bucket, by its upper bound; empty where no value came."""
    whole, below, found = max(buckets.values(), default=0.0), 0.0, {}
    for bound, count in buckets.items():
        if whole:
            found[bound] = (count - below) / whole
        below = count
    return found
