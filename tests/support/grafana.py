"""Queries of dashboards as Grafana puts them to Prometheus: with its variables in their place."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
# What a chosen variable may be: several values, or all of them.
Chosen = Mapping[str, Sequence[str]]


class Asked(NamedTuple):
    """One query.

    Attributes:
        where: dashboard, panel, and which of its queries.
        expr: as it is written.
    """

    where: str
    expr: str


def queries() -> Iterator[Asked]:
    """Every query of every panel."""
    for file in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield Asked(f"{file.stem} / {panel['title']} / {target['refId']}", target["expr"])


def variables() -> dict[str, dict[str, Any]]:
    """The variables that are lists of label values, by name; they are the same on all dashboards."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        for variable in json.loads(file.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                assert found.setdefault(variable["name"], variable) == variable
    return found


def put(expr: str, chosen: Chosen, *, interval_s: float, scrape_s: float) -> str:
    """A query as Prometheus gets it.

    Args:
        expr: with variables.
        chosen: the values of each variable; none of them: All.
        interval_s: between two points of the graph.
        scrape_s: what the data source says that the scrape interval is.
    """
    window_s = max(interval_s + scrape_s, 4 * scrape_s)
    texts = {"__rate_interval": f"{round(window_s * 1000)}ms"}
    for name, variable in variables().items():
        values = chosen.get(name, ())
        # All is what the variable says that it is, untouched.
        texts[name] = _pattern(values) if values else variable["allValue"]
    placed = re.sub(r"\$(\w+)", lambda found: texts[found[1]], expr)
    assert "$" not in placed, placed
    return placed


def labels(query: str) -> tuple[str, str]:
    """The series and the label that `label_values(SERIES, LABEL)` is about."""
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert found, query
    return found[1], found[2]


def _pattern(values: Sequence[str]) -> str:
    """One value stands by itself, several in brackets; each as a pattern, within quotes of PromQL."""
    escaped = [re.sub(r"[\\^$.*+?()[\]{}|]", r"\\\\\g<0>", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
