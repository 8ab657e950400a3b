"""Grafana's dashboards: the code's, well laid out, about metrics that exist, and of the types that Grafana itself has.

What their queries give is in tests/e2e/test_watching.py.
"""

import copy
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conveyor_server.exposition import TABLE
from node_packages import installed, node

ROOT = Path(__file__).resolve().parents[2]
GRAFANA, TYPES = ROOT / "deploy" / "grafana", ROOT / "tests" / "grafana"
FILES = {file.stem: json.loads(file.read_text()) for file in sorted((GRAFANA / "dashboards").glob("*.json"))}
SHOWN = {name: dashboard for name, dashboard in FILES.items() if name != "runbooks"}
RULES = [yaml.safe_load(file.read_text()) for file in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml")]
Json = dict[str, Any]


def _queries(dashboard: Json) -> Iterator[tuple[Json, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel, target["expr"]


# ---------------------------------------------------------------- as they lie there


def test_the_files_are_the_codes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.grafana", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(SHOWN) == {"service", "models", "sessions", "store"}


def test_each_is_found_under_a_name_of_its_own() -> None:
    assert {name: dashboard["uid"] for name, dashboard in FILES.items()} == {name: f"conveyor-{name}" for name in FILES}
    assert len({dashboard["title"] for dashboard in FILES.values()}) == len(FILES)
    for dashboard in FILES.values():
        assert dashboard["id"] is None, "an id is given by whoever imports it"
        assert dashboard["links"][0]["tags"] == dashboard["tags"]


@pytest.mark.parametrize("name", FILES)
def test_panels_have_numbers_of_their_own_and_lie_beside_each_other(name: str) -> None:
    panels = FILES[name]["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(set(numbers)) == len(numbers)
    taken: dict[tuple[int, int], int] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies on panel {taken.get(cell)}"
            taken[cell] = panel["id"]


@pytest.mark.parametrize("name", SHOWN)
def test_panels_say_what_they_show(name: str) -> None:
    panels = [panel for panel in SHOWN[name]["panels"] if panel["type"] != "row"]
    assert len({(panel["title"], panel["type"]) for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


@pytest.mark.parametrize("name", SHOWN)
def test_links_lead_to_the_page_of_the_runbook_that_they_name(name: str) -> None:
    pages = {panel["id"]: panel["title"] for panel in FILES["runbooks"]["panels"]}
    assert set(pages.values()) == {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")}
    found = 0
    for panel in SHOWN[name]["panels"]:
        for link in panel.get("links", ()):
            number = re.fullmatch(r"/d/conveyor-runbooks\?viewPanel=(\d+)", link["url"])
            assert number, link
            assert link["title"] == f"Runbook: {pages[int(number[1])]}"
            found += 1
    assert found >= 5


def test_each_runbook_is_linked_from_a_panel() -> None:
    linked = {
        link["title"].removeprefix("Runbook: ")
        for dashboard in SHOWN.values()
        for panel in dashboard["panels"]
        for link in panel.get("links", ())
    }
    # Without a server there are no panels, and a defect is the log's.
    apart = {"ConveyorAbsent", "ConveyorDefect"}
    assert linked == {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")} - apart


def test_pages_in_grafana_link_to_nothing_that_is_not_there() -> None:
    numbers = {panel["id"] for panel in FILES["runbooks"]["panels"]}
    for panel in FILES["runbooks"]["panels"]:
        for link in re.findall(r"\]\(([^)]+)\)", panel["options"]["content"]):
            found = re.fullmatch(r"/d/conveyor-runbooks\?viewPanel=(\d+)", link)
            assert found, f"{panel['title']}: {link}"
            assert int(found[1]) in numbers


# ---------------------------------------------------------------- what they ask


def test_every_metric_of_the_server_is_shown() -> None:
    asked = " ".join(expr for dashboard in SHOWN.values() for _, expr in _queries(dashboard))
    assert [row.name for row in TABLE if not re.search(rf"\b{row.name}(_bucket|_sum|_count)?\b", asked)] == []


@pytest.mark.parametrize("name", SHOWN)
def test_queries_name_what_there_is(name: str) -> None:
    made = {rule["record"] for file in RULES for group in file["groups"] for rule in group["rules"] if "record" in rule}
    parts = {
        f"{row.name}{part}"
        for row in TABLE
        for part in (("_bucket", "_sum", "_count") if row.kind == "histogram" else ("",))
    }
    variables = {variable["name"] for variable in SHOWN[name]["templating"]["list"]}
    used: set[str] = set()
    for panel, expr in _queries(SHOWN[name]):
        bare = re.sub(r'"[^"]*"', "", expr)
        assert set(re.findall(r"\bconveyor[_:][\w:]+", bare)) <= made | parts, panel["title"]
        used |= set(re.findall(r"\$(\w+)", expr))
    assert used - {"__rate_interval"} == variables - {"datasource"}


def test_failures_are_the_same_in_rules_and_panels() -> None:
    ruled = {
        found
        for file in RULES
        for group in file["groups"]
        for rule in group["rules"]
        if rule.get("record", "").startswith("conveyor:failures:rate")
        for found in re.findall(r'reason=~"([^"]+)"', rule["expr"])
    }
    shown = {
        found
        for panel, expr in _queries(SHOWN["service"])
        if "efusals" in panel["title"] or panel["title"].startswith("Failures")
        for found in re.findall(r'reason[!=]~"([^"]+)"', expr)
    }
    assert len(ruled) == 1
    assert shown == ruled


def test_provisioning_names_the_folders_that_compose_mounts() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "conveyor.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


# ---------------------------------------------------------------- Grafana's types


def _complaints(folder: Path, grafana: str, dashboards: dict[str, Json]) -> dict[str, str]:
    """What the compiler has against each dashboard; it has nothing against those that are not there."""
    packages = installed(TYPES / "package.json")
    folder.mkdir()
    (folder / "dashboard.ts").write_text((TYPES / "dashboard.ts").read_text())
    for name, dashboard in dashboards.items():
        text = json.dumps(dashboard, indent=1)
        head = "import type { DashboardFile } from './dashboard';\nexport const file: DashboardFile ="
        (folder / f"{name}.ts").write_text(f"{head} {text};\n")
    types = str(packages / "node_modules" / grafana)
    queries = str(packages / "node_modules" / "@grafana" / "grafana-foundation-sdk" / "dist" / "*")
    paths = {
        "@grafana/schema": [types],
        "@grafana/schema/*": [f"{types}/*"],
        "@grafana/grafana-foundation-sdk/*": [queries],
    }
    options = {
        **{"noEmit": True, "strict": True, "skipLibCheck": True, "types": [], "target": "es2022", "module": "esnext"},
        **{"moduleResolution": "node", "paths": paths},
    }
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "include": ["*.ts"]}))
    compiler = packages / "node_modules" / "typescript" / "bin" / "tsc"
    command = [node(), str(compiler), "-p", str(folder), "--pretty", "false"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if place := re.search(r"(?:^|/)([\w-]+)\.ts\(\d+,\d+\): error", line):
            found[place[1]] = f"{found.get(place[1], '')}{line}\n"
    assert bool(found) == bool(done.returncode), done.stdout + done.stderr
    return found


def test_the_types_are_those_of_the_grafana_that_compose_runs() -> None:
    (image,) = re.findall(r"image: grafana/grafana:(\S+)", (ROOT / "docker-compose.yml").read_text())
    packages = json.loads((TYPES / "package.json").read_text())["dependencies"]
    assert packages["grafana-12"] == f"npm:@grafana/schema@{image}"


@pytest.mark.parametrize("grafana", ["grafana-11", "grafana-12"])
def test_grafanas_own_types_take_them(tmp_path: Path, grafana: str) -> None:
    assert _complaints(tmp_path / "types", grafana, FILES) == {}


def _first(dashboard: Json, kind: str) -> Json:
    return next(panel for panel in dashboard["panels"] if panel["type"] == kind)


BREAKS: dict[str, Callable[[Json], object]] = {
    "a-title-that-is-none": lambda d: d.update(title=7),
    "no-schema-version": lambda d: d.pop("schemaVersion"),
    "an-unknown-property": lambda d: d.update(refreshes="10s"),
    "a-cursor-that-is-none": lambda d: d.update(graphTooltip=7),
    "a-kind-that-is-none": lambda d: _first(d, "stat").update(type="stats"),
    "no-place": lambda d: _first(d, "stat").pop("gridPos"),
    "a-place-without-width": lambda d: _first(d, "stat")["gridPos"].pop("w"),
    "an-option-that-is-none": lambda d: _first(d, "timeseries")["options"].update(legends={}),
    "a-legend-that-is-none": lambda d: _first(d, "timeseries")["options"]["legend"].update(displayMode="tables"),
    "another-kinds-option": lambda d: _first(d, "stat")["options"].update(cellGap=1),
    "a-line-that-is-none": lambda d: _first(d, "timeseries")["fieldConfig"]["defaults"]["custom"].update(lineWidth="1"),
    "a-colour-mode-that-is-none": lambda d: _first(d, "stat")["fieldConfig"]["defaults"]["color"].update(mode="red"),
    "a-threshold-without-colour": lambda d: _first(d, "stat")["fieldConfig"]["defaults"]["thresholds"]["steps"][0].pop(
        "color"
    ),
    "a-query-that-is-none": lambda d: _first(d, "stat")["targets"][0].update(expr=None),
    "a-query-misspelt": lambda d: _first(d, "stat")["targets"][0].update(query="up"),
    "a-query-of-no-format": lambda d: _first(d, "stat")["targets"][0].update(format="times"),
    "a-variable-without-a-name": lambda d: d["templating"]["list"][1].pop("name"),
    "a-variable-of-no-kind": lambda d: d["templating"]["list"][1].update(type="queries"),
    "a-link-that-is-none": lambda d: d["links"][0].update(type="dashboard"),
}


@pytest.mark.parametrize("grafana", ["grafana-11", "grafana-12"])
def test_grafanas_own_types_do_not_take_broken_ones(tmp_path: Path, grafana: str) -> None:
    broken = {}
    for name, breaks in BREAKS.items():
        broken[name] = copy.deepcopy(FILES["sessions"])
        breaks(broken[name])
        assert broken[name] != FILES["sessions"]
    assert set(_complaints(tmp_path / "types", grafana, broken)) == set(BREAKS)
