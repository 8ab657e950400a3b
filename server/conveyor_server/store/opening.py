"""Which store a setting names."""

from pathlib import Path

from conveyor_server.errors import StartError
from conveyor_server.store.contract import StateStore, StoreInvalid
from conveyor_server.store.sqlite import SqliteStore


def open_store(text: str, *, timeout_s: float = 1.0) -> StateStore | None:
    """The store; None: sessions live in the server's own memory."""
    kind, _, rest = text.partition(":")
    if text == "memory":
        return None
    if kind == "sqlite" and rest:
        path, _, options = rest.partition("?")
        try:
            return SqliteStore(Path(path), synchronous="normal" if "normal" in options else "full", timeout_s=timeout_s)
        except StoreInvalid as error:
            raise StartError(str(error)) from error
    raise StartError(f"{text!r} is no store")
