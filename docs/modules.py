"""Writes the map of modules in docs/architecture.md, or checks it: each module in its own docstring's first sentences.

Invariant: nobody describes a module twice. `python -m docs.modules` writes, `--check` only compares.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = (
    "proto/conveyor_proto",
    "client/conveyor",
    "server/conveyor_server",
    "export/conveyor_export",
)
_BEGIN, _END = "<!-- modules: python -m docs.modules -->\n", "<!-- end of modules -->"


def describe() -> str:
    """The map as Markdown: a table for each package, a row for each module."""
    return "\n".join("\n".join(_table(ROOT / package)) for package in PACKAGES)


def _table(package: Path) -> Iterator[str]:
    yield from ("", f"### {package.relative_to(ROOT)}", "", "| module | what it is |", "|---|---|")
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.pyx")], key=_order):
        if not re.search(r"_pb2(_grpc)?$", file.stem):
            name = file.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
            yield f"| `{name.removesuffix('.__init__')}` | {_first_paragraph(file)} |"
    yield ""


def _order(file: Path) -> tuple[str, ...]:
    """A package before its modules."""
    return (*file.parts[:-1], "" if file.name == "__init__.py" else file.name)


def _first_paragraph(file: Path) -> str:
    source = file.read_text()
    if file.suffix == ".pyx":
        # Cython's syntax is more than Python's; its docstring is the first thing that is no comment.
        source = re.sub(r"(?s)\A(?:#[^\n]*\n)*(\"{3}.*?\"{3}).*", r"\1", source)
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        raise SystemExit(f"{file.relative_to(ROOT)} has no docstring: say what it is")
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def _replaced(page: str) -> str:
    before, found, rest = page.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} has no place for the map: {_BEGIN.strip()} ... {_END}")
    return before + found + describe() + "\n" + ended + after


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the map is not the code's")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    fresh = _replaced(page)
    if arguments.check:
        if page != fresh:
            print(f"{PAGE.relative_to(ROOT)} is not up to date: run python -m docs.modules", file=sys.stderr)
        return int(page != fresh)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
