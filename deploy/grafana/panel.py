"""Panels as Grafana 11 and 12 read them: what ours have in common is said here, what differs by whoever makes one.

Invariant: every panel has a description, a unit, and queries of the dashboard's own data source.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deploy.grafana import runbooks

Json: TypeAlias = dict[str, Any]
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# What a series that is an objective is called, wherever it is drawn.
OBJECTIVE = "objective"
# The window of a rate: long enough for a few scrapes, however far one looks back.
_WINDOW = "[$__rate_interval]"
_RED, _YELLOW, _GREEN, _BLUE = "red", "yellow", "green", "blue"


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        expr: in PromQL, with the dashboard's variables.
        legend: of each of its series; labels in double braces.
        heatmap: its series are buckets.
    """

    expr: str
    legend: str
    heatmap: bool = False

    def json(self, ref: str) -> Json:
        """As a panel's target."""
        return {
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "format": "heatmap" if self.heatmap else "time_series",
            "instant": False,
            "legendFormat": self.legend,
            "range": True,
            "refId": ref,
        }


@dataclass(frozen=True)
class Panel(ABC):
    """One panel; subclasses say which kind.

    Attributes:
        title: what it shows, in a few words.
        description: what it means, and when to worry.
        queries: at least one.
        unit: of Grafana's units: `s`, `bytes`, `percentunit`, `reqps`, `short`, ...
        runbook: an alert to whose page it links; "": none.
        width: of the dashboard's 24 columns.
        height: in Grafana's rows of some 30 pixels.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    runbook: str = ""
    width: int = 8
    height: int = 8

    kind = ""

    def json(self, number: int, x: int, y: int) -> Json:
        """As it lies on the dashboard."""
        return {
            "datasource": SOURCE,
            "description": self.description,
            "fieldConfig": {"defaults": {"unit": self.unit, **self.defaults()}, "overrides": self.overrides()},
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "id": number,
            "links": [link(f"Runbook: {self.runbook}", runbooks.url(self.runbook))] if self.runbook else [],
            "options": self.options(),
            "targets": [query.json(chr(ord("A") + place)) for place, query in enumerate(self.queries)],
            "title": self.title,
            "type": self.kind,
        }

    def defaults(self) -> Json:
        """Of its fields, beside the unit."""
        return {}

    def overrides(self) -> list[Json]:
        """Of single series."""
        return []

    @abstractmethod
    def options(self) -> Json:
        """Of its kind."""


@dataclass(frozen=True)
class Graph(Panel):
    """Lines over time.

    Attributes:
        stacked: the series add up.
        least, most: of its axis.
    """

    stacked: bool = False
    least: float | None = 0
    most: float | None = None

    kind = "timeseries"

    def defaults(self) -> Json:
        """Thin lines, filled where they are stacked."""
        bounds = {name: value for name, value in (("min", self.least), ("max", self.most)) if value is not None}
        return {
            **bounds,
            "color": {"mode": "palette-classic"},
            "custom": {
                "drawStyle": "line",
                "fillOpacity": 30 if self.stacked else 5,
                "lineInterpolation": "linear",
                "lineWidth": 1,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"group": "A", "mode": "normal" if self.stacked else "none"},
            },
        }

    def overrides(self) -> list[Json]:
        """An objective is a red dashed line."""
        style = {"dash": [8, 8], "fill": "dash"}
        properties = [
            {"id": "color", "value": {"fixedColor": _RED, "mode": "fixed"}},
            {"id": "custom.lineStyle", "value": style},
            {"id": "custom.fillOpacity", "value": 0},
        ]
        if not any(query.legend.startswith(OBJECTIVE) for query in self.queries):
            return []
        return [{"matcher": {"id": "byRegexp", "options": f"^{OBJECTIVE}.*"}, "properties": properties}]

    def options(self) -> Json:
        """The legend is a table of the last and the highest value."""
        return {
            "legend": {
                "calcs": ["lastNotNull", "max"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


@dataclass(frozen=True)
class Stat(Panel):
    """The last value, large, in the colour of its threshold.

    Attributes:
        warn, bad: from where on it is yellow and red; None: never.
        low_is_bad: it is the other way round: below `warn` yellow, below `bad` red.
        words: what to say in place of a number.
    """

    warn: float | None = None
    bad: float | None = None
    low_is_bad: bool = False
    words: dict[str, str] = field(default_factory=dict)
    width: int = 4
    height: int = 4

    kind = "stat"

    def defaults(self) -> Json:
        """Its thresholds."""
        steps: list[Json] = [{"color": _BLUE if self.bad is None else _GREEN, "value": None}]
        if self.low_is_bad:
            marks = [(None, _RED), (self.bad, _YELLOW), (self.warn, _GREEN)]
            steps = [{"color": color, "value": value} for value, color in marks]
        else:
            marks = [(self.warn, _YELLOW), (self.bad, _RED)]
            steps += [{"color": color, "value": value} for value, color in marks if value is not None]
        said: Json = {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.words:
            options = {value: {"index": place, "text": text} for place, (value, text) in enumerate(self.words.items())}
            said["mappings"] = [{"options": options, "type": "value"}]
        return said

    def options(self) -> Json:
        """A sparkline below it."""
        return {
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showPercentChange": False,
            "textMode": "auto",
            "wideLayout": True,
        }


@dataclass(frozen=True)
class Heatmap(Panel):
    """Buckets over time: the darker, the more."""

    width: int = 12

    kind = "heatmap"

    def options(self) -> Json:
        """The axis has the buckets' unit."""
        return {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "exponent": 0.5,
                "fill": "dark-orange",
                "mode": "scheme",
                "reverse": False,
                "scale": "exponential",
                "scheme": "Oranges",
                "steps": 64,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": self.unit},
        }

    def defaults(self) -> Json:
        """No more than its axis."""
        return {"custom": {"scaleDistribution": {"type": "linear"}}}


def link(title: str, url: str) -> Json:
    """A link of a panel."""
    return {
        "asDropdown": False,
        "icon": "external link",
        "includeVars": False,
        "keepTime": False,
        "tags": [],
        "targetBlank": False,
        "title": title,
        "tooltip": "",
        "type": "link",
        "url": url,
    }


def rate(metric: str, of: str) -> str:
    """How fast a counter grows, in each second."""
    return f"rate({metric}{{{of}}}{_WINDOW})"


def mean(histogram: str, of: str, by: str) -> str:
    """The mean of what a histogram has seen."""
    total, count = (f"sum by ({by}) ({rate(f'{histogram}_{part}', of)})" for part in ("sum", "count"))
    # Where nothing was seen there is no mean, rather than none that is a number.
    return f"{total} / ({count} > 0)"


def quantiles(histogram: str, of: str, by: str, legend: str, *, shares: Sequence[float] = (0.5, 0.99)) -> list[Query]:
    """What so large a share of a histogram's values is at most; where it has seen any."""
    buckets = f"sum by ({by}, le) ({rate(f'{histogram}_bucket', of)})"
    some = f"sum by ({by}) ({rate(f'{histogram}_count', of)}) > 0"
    return [
        Query(f"histogram_quantile({share}, {buckets}) and on ({by}) {some}", f"p{share * 100:g} {legend}")
        for share in shares
    ]


def buckets(histogram: str, of: str) -> Query:
    """A histogram's buckets, for a heatmap."""
    return Query(f"sum by (le) (increase({histogram}_bucket{{{of}}}{_WINDOW}))", "{{le}}", heatmap=True)
