"""The documentation site: it builds with every link leading somewhere, fetches nothing, and has all of the SDK."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import conveyor
import conveyor.aio
import pytest
import yaml
from packaging.requirements import Requirement

_FETCHED = re.compile(
    r"""<(?:script|img|iframe|link[^>]*rel="(?:stylesheet|preload|preconnect)")[^>]*(?:src|href)="https?:"""
)


def build(folder: Path, root: Path, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    command += ["--config-file", str(config or root / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=quiet, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, root)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_menu_or_pointed_at(site: Path, root: Path) -> None:
    pages = {path.relative_to(root / "docs").with_suffix(".html") for path in (root / "docs").rglob("*.md")}
    assert pages
    index = (site / "index.html").read_text()
    menu = {Path(link.partition("#")[0]) for link in re.findall(r'href="([^":]+\.html)[^"]*"', index)}
    assert pages <= menu, "mkdocs.yml, nav"
    for page in ("index", "changelog", "contributing", "source/deploy"):
        assert (site / f"{page}.html").is_file()


def test_whoever_reads_it_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if _FETCHED.search(page.read_text())] == []
    assert [sheet.name for sheet in site.rglob("*.css") if "url(http" in sheet.read_text()] == []


def test_the_reference_has_every_public_name_and_method(site: Path) -> None:
    told = set(re.findall(r'id="(conveyor[\w.]*)"', (site / "sdk.html").read_text()))
    for name in set(conveyor.__all__) - {"aio", "__version__"}:
        value = getattr(conveyor, name)
        assert {f"conveyor.{name}", f"conveyor.errors.{name}"} & told, name
        if isinstance(value, type) and not issubclass(value, Exception):
            methods = [each for each, what in vars(value).items() if callable(what) and not each.startswith("_")]
            assert {f"conveyor.{name}.{each}" for each in methods} <= told, name
    assert "conveyor.aio.connect" in told


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, root: Path) -> None:
    """Also one to a file beside the docs, which the hook turns into a page."""
    docs = tmp_path / "docs"
    docs.mkdir()
    config = yaml.safe_load((root / "mkdocs.yml").read_text())
    kept = {name: config[name] for name in ("site_name", "theme", "validation", "markdown_extensions")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**kept, "hooks": [str(root / "docs" / "site.py")]}))
    for link, found in (("changelog.md", True), ("../LICENSE", True), ("gone.md", False), ("../gone.txt", False)):
        (docs / "page.md").write_text(f"# Page\n\n[there]({link})\n")
        done = build(tmp_path / "site", root, tmp_path / "mkdocs.yml")
        told = [line for line in (done.stdout + done.stderr).splitlines() if "page.md" in line]
        assert (told == []) == found, (link, told)


def test_what_builds_the_site_is_what_dev_installs(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (own,) = (each for each in map(Requirement, extras["dev"]) if each.name == "conveyor")
    assert "docs" in own.extras
