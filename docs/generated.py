"""A part of a page that a program writes, between two marks: writes it anew, or checks that it is what it should be."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(page: Path, module: str, describe: Callable[[], str]) -> int:
    """Command line of a module that writes a part of a page; returns the exit status.

    Args:
        page: it has the marks `<!-- written by python -m MODULE -->` and `<!-- end of what MODULE wrote -->`.
        module: that writes it.
        describe: what belongs between them.
    """
    parser = argparse.ArgumentParser(description=f"Writes what {module} describes in {page.relative_to(ROOT)}.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the page is not the code's")
    arguments = parser.parse_args()
    old = page.read_text()
    new = _replaced(old, page, module, describe())
    if arguments.check:
        if old != new:
            print(f"{page.relative_to(ROOT)} is not up to date: run python -m {module}", file=sys.stderr)
        return int(old != new)
    page.write_text(new)
    return 0


def _replaced(text: str, page: Path, module: str, part: str) -> str:
    begin, end = f"<!-- written by python -m {module} -->\n", f"<!-- end of what {module} wrote -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page.relative_to(ROOT)} has no place for it: {begin.strip()} ... {end}")
    return before + found + part + "\n" + end + after
