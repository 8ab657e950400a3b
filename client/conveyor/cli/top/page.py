"""A metrics page, read: Prometheus' text format, as far as counters, gauges and histograms use it.

Invariant: what is no sample is passed over, so that a page with more in it than is known here can be read.
The format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Labels: TypeAlias = tuple[tuple[str, str], ...]

_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*")
_LABEL = re.compile(r'\s*(\w+)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Page:
    """All samples of one page.

    Attributes:
        series: by name, the value of each set of labels, which are sorted by name.
    """

    series: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> "Page":
        """Reads the text of a page."""
        series: dict[str, dict[Labels, float]] = {}
        for name, labels, value in _samples(text):
            series.setdefault(name, {})[labels] = value
        return cls(series)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of all series of that name that have these labels; None: there is none."""
        found = [value for has, value in self.series.get(name, {}).items() if labels.items() <= dict(has).items()]
        return sum(found) if found else None

    def values_of(self, label: str, name: str) -> set[str]:
        """What a label is in the series of a name."""
        return {dict(labels)[label] for labels in self.series.get(name, {}) if label in dict(labels)}


def _samples(text: str) -> Iterator[tuple[str, Labels, float]]:
    for line in text.splitlines():
        if line.startswith("#") or (match := _SAMPLE.fullmatch(line)) is None:
            continue
        name, labels, value = match.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        pairs = ((label, _ESCAPED.sub(_unescaped, given)) for label, given in _LABEL.findall(labels or ""))
        yield name, tuple(sorted(pairs)), number


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]
