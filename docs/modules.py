"""Writes the map of modules in docs/architecture.md, or checks it: each module in its own docstring's first sentences.

Invariant: nobody describes a module twice. `python -m docs.modules` writes, `--check` only compares.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from docs import generated

PAGE = generated.ROOT / "docs" / "architecture.md"
PACKAGES = (
    "proto/conveyor_proto",
    "client/conveyor",
    "server/conveyor_server",
    "export/conveyor_export",
)


def describe() -> str:
    """The map as Markdown: a table for each package, a row for each module."""
    return "\n".join("\n".join(_table(generated.ROOT / package)) for package in PACKAGES)


def _table(package: Path) -> Iterator[str]:
    yield from ("", f"### {package.relative_to(generated.ROOT)}", "", "| module | what it is |", "|---|---|")
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
        raise SystemExit(f"{file.relative_to(generated.ROOT)} has no docstring: say what it is")
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(generated.main(PAGE, "docs.modules", describe))
