"""Opens the store that a setting names. Invariant: what is said of a wrong one has no password in it."""

from pathlib import Path
from typing import get_args

from conveyor_server.errors import StartError
from conveyor_server.store.contract import StateStore, StoreInvalid, StoreUnavailable
from conveyor_server.store.sqlite import SqliteStore
from conveyor_server.store.sqlite_file import Synchronous

_FORMS = "--store is memory, sqlite:PATH (sqlite:PATH?synchronous=normal), or valkey://HOST:PORT/DB"
_SCHEMES = ("valkey:", "redis:", "valkeys:", "rediss:")


def open_store(text: str, *, timeout_s: float = 1.0) -> StateStore | None:
    """The store that a setting names; None for memory, where sessions live in the server alone.

    A file is opened or made here; a server is not asked before the first call.

    Args:
        text: `memory`, `sqlite:PATH`, `sqlite:PATH?synchronous=full|normal`, or the URL of a ValkeyStore.
        timeout_s: how long the store may take to answer.

    Raises:
        StartError: it is none of these, its file is no store, or a package is missing.
    """
    try:
        if text == "memory":
            return None
        if text.startswith("sqlite:"):
            return _sqlite(text.removeprefix("sqlite:"), timeout_s)
        if text.startswith(_SCHEMES):
            return _valkey(text, timeout_s)
    except StoreInvalid as error:
        raise StartError(f"this store cannot be used: {error}. {_FORMS}") from error
    except StoreUnavailable as error:
        raise StartError(f"this store cannot be opened now: {error}") from error
    raise StartError(f"this store is of no known kind. {_FORMS}")


def _sqlite(text: str, timeout_s: float) -> StateStore:
    path, _, options = text.partition("?")
    synchronous: Synchronous = "full"
    if options:
        name, _, value = options.partition("=")
        for known in get_args(Synchronous):
            if name == "synchronous" and value == known:
                synchronous = known
                break
        else:
            raise StoreInvalid("the one option of a file is synchronous=full or synchronous=normal")
    if not path:
        raise StoreInvalid("the file has no name")
    return SqliteStore(Path(path), synchronous=synchronous, timeout_s=timeout_s)


def _valkey(url: str, timeout_s: float) -> StateStore:
    try:
        from conveyor_server.store.valkey import ValkeyStore
    except ModuleNotFoundError as error:
        if error.name != "valkey":
            raise
        raise StartError("this store needs a package: pip install 'conveyor[valkey]'") from error
    return ValkeyStore(url, timeout_s=timeout_s)
