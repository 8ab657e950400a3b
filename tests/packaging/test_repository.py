"""The repository keeps its promises: small files, fresh stubs, a true map, documents whose commands and links work."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

# About 250 lines is the aim; beyond these a file holds more than one noun.
LONGEST_SOURCE, LONGEST_TEST = 400, 600
SOURCES = ("client", "server", "export", "proto", "examples", "benchmarks", "docs", "deploy")
UNFINISHED = re.compile(
    r"\b(TODO|FIXME|XXX|HACK)\b|pytest\.(skip|xfail)\b|mark\.(skip|skipif|xfail)\b|NotImplementedError"
)
# Somebody's machine.
PRIVATE_PATH = re.compile(r"(?<![\w.])/(root|Users|home/(?!someone/)\w+)/")
ROOT = Path(__file__).resolve().parents[2]
_PAGES = (ROOT, ROOT / "docs", ROOT / "docs" / "runbooks")
MARKDOWN = [str(path.relative_to(ROOT)) for folder in _PAGES for path in sorted(folder.glob("*.md"))]


def _python(root: Path, *folders: str) -> list[Path]:
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert files
    return [path for path in files if not re.search(r"_pb2(_grpc)?$", path.stem)]


@pytest.mark.parametrize(("folders", "longest"), [(SOURCES, LONGEST_SOURCE), (("tests",), LONGEST_TEST)])
def test_files_are_short(root: Path, folders: tuple[str, ...], longest: int) -> None:
    lengths = {path.relative_to(root): len(path.read_text().splitlines()) for path in _python(root, *folders)}
    assert {str(path): length for path, length in lengths.items() if length > longest} == {}


def test_nothing_is_unfinished_or_private(root: Path) -> None:
    this = Path(__file__).resolve()
    files = [*_python(root, *SOURCES, "tests"), *(root / "proto" / "conveyor").rglob("*.proto")]
    files += [
        root / name for name in (*MARKDOWN, "Makefile", "pyproject.toml", "docker-compose.yml", "server/Dockerfile")
    ]
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in files
        if path != this
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNFINISHED.search(line) or PRIVATE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("check", ["proto.generate", "docs.modules", "docs.settings"])
def test_what_is_generated_is_fresh(root: Path, check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", check, "--check"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_floors_in_the_docs_are_the_linters(root: Path) -> None:
    contract = (root / ".importlinter").read_text().partition("[importlinter:contract:floors]")[2]
    layers = contract.partition("layers =\n")[2].partition("exhaustive")[0]
    linted = [set(re.findall(r"\w+", line)) for line in layers.strip().splitlines()]
    table = (root / "docs" / "architecture.md").read_text().partition("| floor |")[2].partition("\n\n")[0]
    drawn = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    assert drawn == linted


def test_every_make_target_that_is_named_exists(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for name in MARKDOWN
        for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", _text(root, name), re.MULTILINE)
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def test_every_link_leads_somewhere(root: Path) -> None:
    missing = [
        f"{name}: {link}"
        for name in MARKDOWN
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", _text(root, name))
        if "://" not in link and not (root / name).parent.joinpath(link).exists()
    ]
    assert missing == []


def test_every_conveyor_command_that_is_named_is_understood(root: Path) -> None:
    """Commands in the documents' code blocks, with their flags: parsed by the real parsers, and not run."""
    from conveyor.cli.main import _parser
    from conveyor_export.cli import _export_parser, _inspect_parser
    from conveyor_server import configuration
    from conveyor_server.adopt.command import parser as adopt_parser

    understood = 0
    for name in (
        "README.md",
        "docs/export.md",
        "docs/adopt.md",
        "docs/durability.md",
        "docs/models.md",
        "docs/workers.md",
        "docs/top.md",
        "docs/doctor.md",
        "docs/operations.md",
        "docs/quickstart.md",
        "examples/_demo/next_steps.py",
        "examples/charlm.py",
        "examples/co2.py",
    ):
        text = re.sub(r"\\\n\s*", "", _text(root, name))
        for line in re.findall(r"^ +conveyor (\w.*)$", text, re.MULTILINE):
            command, *arguments = shlex.split(re.split(r"\s{2,}|\s+#", line)[0])
            if command == "serve":
                configuration.load(arguments, {})
            elif command in {"doctor", "config"}:
                own = {"check", "--json", "--quiet", "--changed", "--config", "conveyor.toml"}
                configuration.load([each for each in arguments if each not in own], {})
            elif command in {"export", "inspect", "adopt"}:
                parsers = {"export": _export_parser, "inspect": _inspect_parser, "adopt": adopt_parser}
                parsers[command]().parse_args(arguments)
            else:
                assert isinstance(_parser({}).parse_args([command, *arguments]), argparse.Namespace)
            understood += 1
    assert understood >= 10


def test_ci_runs_the_checks_and_the_tests(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE) == ["check", "test"]


def _text(root: Path, name: str) -> str:
    return (root / name).read_text()
