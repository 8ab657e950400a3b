"""The runbooks as a dashboard of their own, so that a panel can link to a page wherever Grafana runs.

Invariant: a page's panel has the number of its place among all pages, and `url` leads there.
"""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "runbooks"
UID = "conveyor-runbooks"
_HEIGHT, _WIDTH = 16, 12


def url(name: str) -> str:
    """Where Grafana shows the page of an alert."""
    return f"/d/{UID}?viewPanel={_names().index(name) + 1}"


def panels() -> list[dict[str, Any]]:
    """All pages, two beside each other."""
    return [_panel(place, name) for place, name in enumerate(_names())]


def _names() -> list[str]:
    return sorted(page.stem for page in FOLDER.glob("*.md"))


def _panel(place: int, name: str) -> dict[str, Any]:
    text = (FOLDER / f"{name}.md").read_text()
    return {
        "description": f"docs/runbooks/{name}.md",
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": place % 2 * _WIDTH, "y": place // 2 * _HEIGHT},
        "id": place + 1,
        "options": {"content": _shown(text.partition("\n\n")[2]), "mode": "markdown"},
        "title": name,
        "type": "text",
    }


def _shown(text: str) -> str:
    """With links between pages as Grafana needs them; where there is no page in Grafana, its place is said."""
    text = re.sub(r"\]\((\w+)\.md\)", lambda found: f"]({url(found[1])})", text)
    return re.sub(r"\[[^\]]*\]\(\.\./([^)#]+)[^)]*\)", _place, text)


def _place(found: re.Match[str]) -> str:
    path = found[1].removeprefix("../")
    return f"`{path if found[1].startswith('../') else f'docs/{path}'}`"
