"""`conveyor token`: makes tokens for the access file.

Invariant: the token is told once, to whoever made it; what goes into the access file does not tell it.
"""

import argparse
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from conveyor_server.errors import StartError
from conveyor_server.identity.access import ANY_TENANT
from conveyor_server.identity.caller import TENANT, Role

_PROG = "conveyor token new"
# 256 bits, so that nobody finds a token by its SHA-256; and so that it is recognised where it should not be.
_PREFIX, _BYTES = "cvy_", 32


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(f"{message}; see {_PROG} --help")


def command(arguments: Sequence[str]) -> int:
    """Runs `conveyor token`; returns the exit status.

    Args:
        arguments: without the program's name and `token`.
    """
    if list(arguments[:1]) != ["new"]:
        print(f"usage: {_PROG} --name NAME --tenant TENANT --role ROLE [--out FILE]", file=sys.stderr)
        return 0 if {"-h", "--help"} & set(arguments[:1]) else 2
    try:
        _new(arguments[1:])
    except StartError as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return 2
    return 0


def _new(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog=_PROG,
        description="Makes a bearer token, and prints what goes into the server's access file for it.",
    )
    parser.add_argument("--name", required=True, help="whose it is, for people")
    parser.add_argument("--tenant", required=True, help="whom its bearer acts for; '*': any tenant")
    parser.add_argument(
        "--role", dest="roles", action="append", required=True, choices=[*Role], help="what they may do; repeatable"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the token into this new file, instead of to standard error"
    )
    given = parser.parse_args(arguments)
    if given.tenant != ANY_TENANT and not TENANT.fullmatch(given.tenant):
        raise StartError(f"--tenant {given.tenant!r}: 1 to 64 letters, digits, '.', '_' or '-'; or '*'")
    if not given.name.isprintable() or not given.name:
        raise StartError("--name is one line of text")
    token = _PREFIX + secrets.token_urlsafe(_BYTES)
    if given.out is not None:
        _write(given.out, token)
    else:
        print(f"the token, which is not told again: {token}", file=sys.stderr)
    print(_entry(given.name, given.tenant, given.roles, token))


def _entry(name: str, tenant: str, roles: Sequence[str], token: str) -> str:
    quoted = ", ".join(f'"{role}"' for role in dict.fromkeys(roles))
    lines = (
        "[[tokens]]",
        f"name = {_quoted(name)}",
        f'sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"',
        f'tenant = "{tenant}"',
        f"roles = [{quoted}]",
    )
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write(path: Path, token: str) -> None:
    try:
        # Its owner's alone from the first moment.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from error
