"""Writes the table of settings in docs/settings.md, or checks it: each as the code describes it.

Invariant: nobody describes a setting twice. `python -m docs.settings` writes, `--check` only compares.
"""

import sys
from collections.abc import Iterator

from conveyor_server.configuration import ENVIRONMENT_PREFIX
from conveyor_server.settings import FIELDS, SWITCH, Field

from docs import generated

PAGE = generated.ROOT / "docs" / "settings.md"


def describe() -> str:
    """The table as Markdown."""
    return "\n".join(_table())


def _table() -> Iterator[str]:
    yield from ("", "| flag | variable | default | what it is |", "|---|---|---|---|")
    for field in FIELDS.values():
        default = field.text(field.default)
        cells = (
            f"`{field.flag}`",
            f"`{ENVIRONMENT_PREFIX}{field.name.upper()}`",
            f"`{default}`" if default else "",
            field.doc.help.replace("|", "\\|") + _what(field),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _what(field: Field) -> str:
    words = field.choices or (SWITCH if field.type is bool else ())
    if words:
        return f" ({', '.join(f'`{word}`' for word in words)})"
    if field.kind not in {int, float}:
        return ""
    what = "a whole number" if field.kind is int else "a number"
    auto = ", or `auto`" if field.doc.auto else ""
    return f" ({what} from {field.doc.least:g}{auto})"


if __name__ == "__main__":
    sys.exit(generated.main(PAGE, "docs.settings", describe))
