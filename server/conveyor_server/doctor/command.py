"""`conveyor doctor`: the command.

Invariant: exit status 0, all is good; 1, a server would serve, less well than it could; 2, it would not start or not
serve what it should, or the settings cannot be meant.
"""

import json
import os
import sys
from collections.abc import Sequence

from conveyor_server.configuration import ENVIRONMENT_PREFIX, resolve
from conveyor_server.doctor.finding import Finding, Level
from conveyor_server.errors import StartError

_PROG = "conveyor doctor"
_USAGE = f"""usage: {_PROG} [--json] [--quiet] [flags of conveyor serve]

Looks at what a server with these flags, the environment ({ENVIRONMENT_PREFIX}...) and
the file (--config or {ENVIRONMENT_PREFIX}CONFIG) would need: ports, certificates, who may
call, models, device, store, clock, limits. Starts nothing, and leaves a server
that runs alone. Run it as the user that the server runs as.
Exit status: 0 all is good; 1 something to look at; 2 something to fix first.

  --json   print JSON
  --quiet  leave out what is good
"""
_MARKS = {Level.GOOD: "ok", Level.WARNING: "LOOK", Level.BAD: "FIX"}
_OWN = {"--json", "--quiet"}


def command(arguments: Sequence[str]) -> int:
    """Runs `conveyor doctor`; returns the exit status.

    Args:
        arguments: without the program's name and `doctor`.
    """
    if {"-h", "--help"} & set(arguments):
        print(_USAGE, end="")
        return 0
    try:
        settings = resolve([each for each in arguments if each not in _OWN], os.environ, _PROG).settings
    except StartError as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return 2
    # Looks at the variable before it is set.
    from conveyor_server.doctor import runtime  # noqa: F401

    # onnxruntime reads it when it is imported, which the other checks do.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        from conveyor_server.doctor import checks
    except ModuleNotFoundError as error:
        print(f"{_PROG}: {error}: install the server with pip install 'conveyor[server]'", file=sys.stderr)
        return 2
    findings = list(checks.run(settings))
    shown = [(name, each) for name, each in findings if each.level or "--quiet" not in arguments]
    print(_json(shown) if "--json" in arguments else _text(shown, findings))
    return max(each.level for _, each in findings)


def _json(findings: Sequence[tuple[str, Finding]]) -> str:
    rows = [
        {"check": name, "level": each.level.name.lower(), "what": each.what, "fix": each.fix} for name, each in findings
    ]
    return json.dumps(rows, indent=2)


def _text(shown: Sequence[tuple[str, Finding]], findings: Sequence[tuple[str, Finding]]) -> str:
    lines = []
    for name, each in shown:
        lines.append(f"{_MARKS[each.level]:4}  {name:12}  {each.what}")
        if each.fix:
            lines.append(f"{'':20}-> {each.fix}")
    counts = {level: sum(each.level is level for _, each in findings) for level in Level}
    lines.append(f"{counts[Level.GOOD]} good, {counts[Level.WARNING]} to look at, {counts[Level.BAD]} to fix")
    return "\n".join(lines)
