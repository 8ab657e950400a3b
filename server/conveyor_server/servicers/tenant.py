"""Whose a unary call is: what its caller says, for quotas.

It is believed: whoever lets strangers in puts a proxy before the server that sets it.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

METADATA_KEY = "x-tenant-id"
_current: ContextVar[str] = ContextVar("tenant", default="")


def of_call() -> str:
    """The tenant of the call that is being answered; "": nobody's."""
    return _current.get()


def enter(metadata: Iterable[Any] | None) -> None:
    """A call begins, in this context, whose client sent that ahead."""
    _current.set(next((str(value) for key, value, *_ in metadata or () if key == METADATA_KEY), ""))
