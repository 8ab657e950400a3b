"""Writes the dashboards that Grafana reads, or checks them: `python -m deploy.grafana`, `--check` only compares.

Invariant: nobody edits deploy/grafana/dashboards by hand. What Grafana's editor made is brought back as code.
"""

import argparse
import json
import sys
from pathlib import Path

from deploy.grafana import models, service, sessions, store
from deploy.grafana.dashboard import runbook_dashboard

FOLDER = Path(__file__).resolve().parent / "dashboards"


def files() -> dict[str, str]:
    """What each file should hold, by its name."""
    made = {page.DASHBOARD.name: page.DASHBOARD.json() for page in (service, models, sessions, store)}
    made["runbooks"] = runbook_dashboard()
    return {f"{name}.json": json.dumps(dashboard, indent=2) + "\n" for name, dashboard in made.items()}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes deploy/grafana/dashboards.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the files are not the code's")
    arguments = parser.parse_args()
    made = files()
    there = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    if arguments.check:
        if made != there:
            print("deploy/grafana/dashboards is not up to date: run python -m deploy.grafana", file=sys.stderr)
        return int(made != there)
    for name in there.keys() - made.keys():
        (FOLDER / name).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
