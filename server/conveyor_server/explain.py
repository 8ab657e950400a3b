"""`conveyor config check`: what a server would be set to, and what says so; nothing is started.

Invariant: what `conveyor serve` takes or refuses it takes or refuses too, in the same words; it prints no password.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

from conveyor_server.configuration import ENVIRONMENT_PREFIX, Resolved, resolve
from conveyor_server.errors import StartError
from conveyor_server.settings import FIELDS

_PROG = "conveyor config check"
_USAGE = f"""usage: {_PROG} [--json] [--changed] [flags of conveyor serve]

Says what `conveyor serve` would be set to by these flags, the environment
({ENVIRONMENT_PREFIX}...) and the file (--config or {ENVIRONMENT_PREFIX}CONFIG), and which of them says so.
Exit status 2: something in them is no setting, or cannot be meant.

  --json     print JSON
  --changed  leave out what has its default
"""
# In a URL, what comes before the host; also where it is not written as it should be.
_SECRET = re.compile(r"(?<=://).*@")


def command(arguments: Sequence[str]) -> int:
    """Runs `conveyor config`; returns the exit status.

    Args:
        arguments: without the program's name and `config`.
    """
    if list(arguments[:1]) != ["check"] or {"-h", "--help"} & set(arguments):
        asked = bool({"-h", "--help"} & set(arguments))
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    flags = [argument for argument in arguments[1:] if argument not in {"--json", "--changed"}]
    try:
        resolved = resolve(flags, os.environ, _PROG)
    except StartError as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return 2
    rows = _rows(resolved, changed="--changed" in arguments)
    print(json.dumps(rows, indent=2) if "--json" in arguments else _table(rows))
    return 0


def _rows(resolved: Resolved, *, changed: bool) -> Mapping[str, Mapping[str, str]]:
    """Value and source of each setting, by name."""
    return {
        name: {
            "value": _SECRET.sub("***@", field.text(getattr(resolved.settings, name))),
            "from": resolved.sources.get(name, "default"),
        }
        for name, field in FIELDS.items()
        if name in resolved.sources or not changed
    }


def _table(rows: Mapping[str, Mapping[str, str]]) -> str:
    lines = [("SETTING", "VALUE", "FROM"), *((name, row["value"], row["from"]) for name, row in rows.items())]
    first, second = (max(len(line[column]) for line in lines) for column in range(2))
    return "\n".join(f"{name:{first}}  {value:{second}}  {source}" for name, value, source in lines)
