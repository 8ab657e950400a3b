"""The rules of deploy/prometheus: Prometheus takes them, each alert is seen to fire and not to, each has a runbook."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conveyor.cli.main import _parser
from conveyor_server import configuration
from conveyor_server.exposition import TABLE
from conveyor_server.settings import FIELDS
from prometheus_process import check, programs

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
RULES, UNIT_TESTS = sorted((DEPLOY / "rules").glob("*.yml")), sorted((DEPLOY / "tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs" / "runbooks"
SECTIONS = ["What it means", "Impact", "How to look", "What to do"]
OTHERS_METRICS = re.compile(r"up|process_\w+|scrape_duration_seconds|container_\w+")


def _rules() -> Iterator[dict[str, Any]]:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


ALERTS = {rule["alert"]: rule for rule in _rules() if "alert" in rule}
RECORDED = {rule["record"] for rule in _rules() if "record" in rule}
PAGES = {page.stem: page.read_text() for page in RUNBOOKS.glob("*.md")}


def _blocks(language: str) -> list[tuple[str, str]]:
    """Page and line, of all blocks of a language in the runbooks."""
    return [
        (name, line)
        for name, text in PAGES.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        for line in block.strip().splitlines()
    ]


# ---------------------------------------------------------------- rules


def test_prometheus_takes_the_configuration_and_the_rules(tmp_path: Path) -> None:
    """With the rules where they are here; in a container they are mounted."""
    text = (DEPLOY / "prometheus.yml").read_text()
    assert yaml.safe_load(text)["rule_files"] == ["/etc/prometheus/rules/*.yml"]
    file = tmp_path / "prometheus.yml"
    file.write_text(text.replace("/etc/prometheus/rules", str(DEPLOY / "rules")))
    done = check("check", "config", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(count) for count in re.findall(r"(\d+) rules found", done.stdout)) == len(list(_rules()))


def test_a_broken_rule_is_not_taken(tmp_path: Path) -> None:
    for number, (right, wrong) in enumerate([("up{", "up{{"), ("$labels.instance", "$labels.")]):
        file = tmp_path / f"{number}.yml"
        text = (DEPLOY / "rules" / "service.yml").read_text()
        file.write_text(text.replace(right, wrong))
        assert file.read_text() != text
        assert check("check", "rules", file).returncode != 0


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_alerts_fire_and_do_not(file: Path) -> None:
    done = check("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_never_fires_is_found(tmp_path: Path) -> None:
    for folder in ("rules", "tests"):
        (tmp_path / folder).mkdir()
        for file in (DEPLOY / folder).glob("*.yml"):
            (tmp_path / folder / file.name).write_text(file.read_text().replace("conveyor_store_lag_seconds >", "0 >"))
    done = check("test", "rules", tmp_path / "tests" / "store.yml")
    assert done.returncode != 0
    assert "ConveyorStoreLag" in done.stdout + done.stderr


def test_each_alert_is_seen_to_fire_and_in_the_same_test_not_to() -> None:
    fires: set[str] = set()
    for file in UNIT_TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            looks = [look for look in test["promql_expr_test"] if look["expr"].startswith("ALERTS")]
            named = {name for look in looks for name in re.findall(r'alertname="(\w+)"', str(look["exp_samples"]))}
            if named:
                assert any(look["exp_samples"] == [] for look in looks), test["name"]
            fires |= named
    assert fires == set(ALERTS)


def test_each_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in {"critical", "warning"}, name
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"


def test_rules_name_what_there_is() -> None:
    for rule in _rules():
        if not str(rule["expr"]).startswith("vector("):
            _exists(str(rule["expr"]))


def test_thresholds_are_in_objectives_alone() -> None:
    """What alerts compare with where it is a matter of taste is a series of that file."""
    objectives = {name for name in RECORDED if name.endswith(":objective")}
    made = {
        rule["record"]
        for rule in yaml.safe_load((DEPLOY / "rules" / "objectives.yml").read_text())["groups"][0]["rules"]
    }
    assert objectives == made
    used = {name for alert in ALERTS.values() for name in re.findall(r"conveyor:\w+:objective", alert["expr"])}
    assert used == objectives


# ---------------------------------------------------------------- runbooks


def test_there_is_a_page_for_each_alert_and_no_other() -> None:
    assert set(PAGES) == set(ALERTS)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_says_what_whoever_is_woken_wants_to_know(name: str) -> None:
    text = PAGES[name]
    assert text.startswith(f"# {name}\n")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    assert parts[::2] == SECTIONS
    words = {title: len(part.split()) for title, part in zip(SECTIONS, parts[1::2], strict=True)}
    assert min(words["What it means"], words["What to do"]) >= 15
    assert "```" in parts[5], "no command and no query to look with"
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if not (RUNBOOKS / link).exists()] == []
    flags = set(re.findall(r"`(--[a-z-]+)[` ]", text))
    assert flags <= {field.flag for field in FIELDS.values()}


def test_queries_in_the_pages_are_understood_and_name_what_there_is(tmp_path: Path) -> None:
    queries = _blocks("promql")
    assert len(queries) > 2 * len(PAGES)
    for _, query in queries:
        _exists(query)
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = check("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_in_the_pages_are_understood() -> None:
    """Parsed by the real parsers, and not run."""
    commands = [line for _, line in _blocks("sh") if line.startswith("conveyor ")]
    assert len(commands) >= 5
    for command in commands:
        _, *words = shlex.split(command)
        if words[:2] == ["config", "check"]:
            configuration.load([word for word in words[2:] if word != "--changed"], {})
        elif words[0] == "doctor":
            configuration.load(words[1:], {})
        elif words[0] == "inspect":
            assert len(words) == 2
        else:
            _parser({}).parse_args(words)
    pages = {path for _, line in _blocks("sh") for path in re.findall(r"HOST:9464(/\w+)", line)}
    assert pages <= {"/metrics", "/healthz", "/readyz"}


def test_the_docs_list_every_alert() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]\(runbooks/\1\.md\) \| (\w+) \|", text, re.MULTILINE) == [
        (name, alert["labels"]["severity"]) for name, alert in ALERTS.items()
    ]


def _exists(expression: str) -> None:
    """Every metric and every recorded series that is named is made somewhere."""
    known = RECORDED.copy()
    for row in TABLE:
        known |= (
            {row.name} if row.kind != "histogram" else {f"{row.name}_{part}" for part in ("bucket", "count", "sum")}
        )
    named = set(re.findall(r"\bconveyor[_:][\w:]+", re.sub(r'"[^"]*"', "", expression)))
    assert named <= known, named - known
    others = set(re.findall(r"\b(?:up|process_\w+|scrape_\w+)\b", expression))
    assert named or others, f"{expression} names no metric"
    assert all(OTHERS_METRICS.fullmatch(name) for name in others)


# ---------------------------------------------------------------- Prometheus itself


def test_those_in_the_path_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus", "promtool"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs() == (tmp_path / "prometheus", tmp_path / "promtool")


def test_where_they_cannot_be_had_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "environment"))
    with pytest.raises(AssertionError, match=r"the tests need `prometheus` and `promtool`, .* in PATH: install them"):
        programs()
    assert not (tmp_path / "environment" / "debian" / "prometheus").exists()
