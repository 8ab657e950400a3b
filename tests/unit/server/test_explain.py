"""`conveyor config check`: what is told is what a server would have, and nobody's password."""

import json
import re
from pathlib import Path

import pytest
from conveyor_server import explain
from conveyor_server.configuration import ENVIRONMENT_PREFIX, load
from conveyor_server.settings import FIELDS, Settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without settings, and to be given some."""
    for name in FIELDS:
        monkeypatch.delenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", raising=False)
    return monkeypatch


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    """Runs it, and returns the exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = explain.command(arguments)
        return (status, *capsys.readouterr())

    return run


def test_every_setting_is_told_with_its_value_and_what_says_so(told, environment, tmp_path: Path) -> None:
    file = tmp_path / "conveyor.toml"
    file.write_text('port = 1\nhost = "localhost"\nlog_level = "debug"\n')
    environment.setenv("CONVEYOR_PORT", "2")
    environment.setenv("CONVEYOR_HOST", "127.0.0.2")
    status, out, _ = told("check", "--json", "--config", str(file), "--port", "3")
    rows = json.loads(out)
    assert status == 0
    assert list(rows) == list(FIELDS)
    assert rows["port"] == {"value": "3", "from": "the command line"}
    assert rows["host"] == {"value": "127.0.0.2", "from": "the environment"}
    assert rows["log_level"] == {"value": "debug", "from": str(file)}
    assert rows["metrics_port"] == {"value": str(Settings().metrics_port), "from": "default"}


def test_what_is_told_makes_the_same_settings_again(told) -> None:
    flags = ["--inline-run-s", "auto", "--max-sessions", "7", "--diagnostics", "--store", "sqlite:x.db"]
    rows = json.loads(told("check", "--json", *flags)[1])
    again = [text for name, row in rows.items() if row["value"] for text in (FIELDS[name].flag, row["value"])]
    assert load(again, {}) == load(flags, {})


def test_what_has_its_default_can_be_left_out(told) -> None:
    status, out, _ = told("check", "--changed", "--port", "3")
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["SETTING", "VALUE", "FROM"],
        ["port", "3", "the", "command", "line"],
    ]


@pytest.mark.parametrize("url", ["valkey://user:s3cret@host:1/0", "valkey://:s3/cr@et@host:1/0"])
def test_no_password_is_told(told, environment, url: str) -> None:
    environment.setenv("CONVEYOR_STORE", url)
    for form in ([], ["--json"]):
        status, out, err = told("check", *form)
        assert status == 0
        assert "valkey://***@host:1/0" in out
        assert "s3" not in out + err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "1"], "--prot is not a flag of conveyor config check: did you mean --port?"),
        (["--port", "x"], "port = 'x' from the command line is not a whole number"),
        (["--durability", "sync"], "durability needs a store"),
        (["--config", "/no/such.toml"], "cannot read /no/such.toml"),
    ],
)
def test_what_a_server_would_refuse_is_refused(told, arguments: list[str], said: str) -> None:
    status, out, err = told("check", *arguments)
    assert (status, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("arguments", [[], ["chekc"], ["--port", "1"]])
def test_whoever_asks_for_something_else_is_told_what_there_is(told, arguments: list[str]) -> None:
    status, out, err = told(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: conveyor config check")


def test_help_is_no_error(told) -> None:
    status, out, err = told("check", "--help")
    assert (status, err) == (0, "")
    assert "--changed" in out


def test_the_file_in_the_docs_is_understood(told, tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "settings.md").read_text(), re.DOTALL)
    file = tmp_path / "conveyor.toml"
    file.write_text(example)
    status, out, _ = told("check", "--json", "--changed", "--config", str(file))
    assert status == 0
    assert {name: row["value"] for name, row in json.loads(out).items()} == {
        "max_sessions": "20000",
        "store": "sqlite:/var/lib/conveyor/sessions.db",
        "drain_notice_s": "3.0",
    }
