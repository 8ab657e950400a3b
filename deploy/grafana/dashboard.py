"""A dashboard: its variables, its rows of panels, and where they lie.

Invariant: panels lie in the order in which they are given, from left to right, and nothing overlaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.grafana import runbooks
from deploy.grafana.panel import SOURCE, Json, Panel, link

# Grafana 11's; 12 reads it too.
SCHEMA_VERSION = 39
_COLUMNS = 24
_TAG = "conveyor"
# In a query: the series of the jobs, servers and models that are chosen.
SERVER = 'job=~"$job", instance=~"$instance"'
MODEL = f'{SERVER}, model=~"$model"'
# Of series that are made of all servers together.
JOB = 'job=~"$job"'
JOB_MODEL = f'{JOB}, model=~"$model"'


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard.

    Attributes:
        name: of its file, and the end of its uid.
        title: as people read it.
        description: what it is for.
        rows: from top to bottom.
        by_model: it can be narrowed to models.
    """

    name: str
    title: str
    description: str
    rows: Sequence[Row]
    by_model: bool = True

    def json(self) -> Json:
        """As Grafana reads it."""
        return _json(self.name, self.title, self.description, self._panels(), _variables(self.by_model))

    def _panels(self) -> list[Json]:
        found: list[Json] = []
        y = 0
        for row in self.rows:
            found.append(
                {
                    "collapsed": False,
                    "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
                    "id": len(found) + 1,
                    "panels": [],
                    "title": row.title,
                    "type": "row",
                }
            )
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > _COLUMNS:
                    x, y, height = 0, y + height, 0
                found.append(panel.json(len(found) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return found


def runbook_dashboard() -> Json:
    """The pages of docs/runbooks."""
    what = "What each alert means, what it costs, where to look and what to do; made of docs/runbooks."
    return _json("runbooks", "Conveyor / Runbooks", what, runbooks.panels(), [])


def _json(name: str, title: str, description: str, panels: list[Json], variables: list[Json]) -> Json:
    others = {**link("Conveyor", ""), "includeVars": True, "keepTime": True, "tags": [_TAG], "type": "dashboards"}
    return {
        "annotations": {"list": [_BUILT_IN, *([_alerts()] if variables else [])]},
        "description": description,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "id": None,
        "links": [others],
        "panels": panels,
        "refresh": "10s" if variables else "",
        "schemaVersion": SCHEMA_VERSION,
        "tags": [_TAG],
        "templating": {"list": variables},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": title,
        "uid": f"conveyor-{name}",
        "version": 1,
    }


_BUILT_IN: Json = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}


def _alerts() -> Json:
    """Marks in every graph when an alert fires."""
    expr = f'ALERTS{{alertstate="firing", alertname=~"Conveyor.*", {JOB}}}'
    return {
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "name": "Alerts",
        "tagKeys": "severity",
        "target": {"expr": expr, "interval": "15s", "refId": "Alerts"},
        "textFormat": "{{instance}} {{model}}",
        "titleFormat": "{{alertname}}",
    }


def _variables(by_model: bool) -> list[Json]:
    source = {
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
        "type": "datasource",
    }
    # Of jobs, those alone that have servers of ours: `up` and `process_*` are everybody's.
    choices = [
        ("job", "Job", "label_values(conveyor_build_info, job)"),
        ("instance", "Server", 'label_values(conveyor_build_info{job=~"$job"}, instance)'),
        ("model", "Model", f"label_values(conveyor_model_ready{{{SERVER}}}, model)"),
    ]
    return [source, *(_choice(*choice) for choice in choices[: 3 if by_model else 2])]


def _choice(name: str, label: str, query: str) -> Json:
    return {
        # All of them, also those that have come since the list was made.
        **({} if name == "job" else {"allValue": ".+"}),
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": SOURCE,
        "hide": 0,
        "includeAll": True,
        "label": label,
        "multi": True,
        "name": name,
        "options": [],
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
        "type": "query",
    }
