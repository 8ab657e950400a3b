"""Who calls, and whose sessions are theirs.

Invariant: a session's full name is `TENANT/ID`, or `ID` where it is no tenant's; a caller who acts for a tenant reaches
no full name but that tenant's, and is shown ids alone. So another tenant's session is not there, and its id is free.
"""

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

_SEPARATOR = "/"
# Behind every name there can be.
_LAST = "\x7f"
TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Role(StrEnum):
    """What callers may do."""

    INFER = "infer"
    OBSERVE = "observe"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Any thread.

    Attributes:
        name: of the token, certificate or subject, for people; "": nobody who says so.
        roles: what they may do.
        tenant: whom they act for; "": no one, and they see every tenant's sessions under their full names.
        models: patterns of the models that are there for them, as of fnmatch.
        max_sessions: of the tenant, in the store and in memory; 0: the server's setting.
    """

    name: str = ""
    roles: frozenset[Role] = frozenset(Role)
    tenant: str = ""
    models: Sequence[str] = ("*",)
    max_sessions: int = 0

    def full_name(self, session_id: str) -> str:
        """Of the session that they call so; "" stays empty."""
        return full_name(self.tenant, session_id) if session_id else ""

    def shown(self, name: str) -> str:
        """What they call the session of that full name."""
        return public_name(name) if self.tenant else name

    def uses(self, model: str) -> bool:
        """The model is there for them."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)


# Whoever calls a server that asks nobody who they are.
ANYBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def full_name(tenant: str, session_id: str) -> str:
    """Of a tenant's session."""
    return f"{tenant}{_SEPARATOR}{session_id}" if tenant else session_id


def public_name(name: str) -> str:
    """The session id in a full name."""
    return name.partition(_SEPARATOR)[2] or name


def prefix(tenant: str) -> str:
    """What the full names of a tenant's sessions begin with, and no others."""
    return full_name(tenant, "")


def bounds(tenant: str) -> tuple[str, str]:
    """Just before and behind all full names of a tenant's sessions, or of all sessions without one, in ASCII order."""
    first = prefix(tenant)
    return first, (first[:-1] + chr(ord(_SEPARATOR) + 1)) if tenant else _LAST


def of_call() -> Caller:
    """Who makes the unary call that is being answered."""
    return _current.get()


def enter(caller: Caller) -> None:
    """A call of theirs begins, in this context."""
    _current.set(caller)
