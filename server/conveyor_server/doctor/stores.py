"""The store: whether it is there, can be written, keeps what it is given, and has the time that we have.

Invariant: a file that is not there is not made, and no URL's password is said.
"""

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from conveyor_server.doctor import valkeys
from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.doctor.probe import probe
from conveyor_server.errors import StartError
from conveyor_server.keeper import head
from conveyor_server.settings import Settings
from conveyor_server.store.contract import StateStore, StoreUnavailable
from conveyor_server.store.opening import open_store

# Beyond it, an answer of a sync session waits longer than most runs of a model take.
_SLOW_S = 0.02
_SKEW_S = 2.0
_LEAST_FREE_BYTES = 1 << 30
_LOOKED_AT = 500


def check(settings: Settings) -> Iterator[Finding]:
    """The store of the settings."""
    if settings.store == "memory":
        yield good("no store: sessions end with the server")
        return
    if settings.store.startswith("sqlite:"):
        path = Path(settings.store.removeprefix("sqlite:").partition("?")[0])
        yield from _file(path)
        if not path.exists():
            return
    try:
        store = open_store(settings.store, timeout_s=settings.store_timeout_s)
    except StartError as error:
        yield bad(str(error), "give --store one of these forms, or see to what it says")
        return
    if store is not None:
        try:
            yield from _asked(store, settings)
        finally:
            store.close()


def _file(path: Path) -> Iterator[Finding]:
    folder = path.absolute().parent
    if not folder.is_dir():
        yield bad(f"{folder}, where the store's file is to be, is no folder", f"mkdir -p {folder}")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield bad(
            f"nothing can be written in {folder}, and SQLite has files beside the store's",
            f"let the server's user write there: chown, or another --store than {path}",
        )
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        yield warning(f"{free / 1e6:.0f} MB are free in {folder}", "make room: a full disk refuses every durable step")
    if not path.exists():
        yield good(f"{path} is not there yet: the server makes it")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        yield warning(f"{path} is open to everybody on this machine (mode {mode:o})", f"chmod 600 {path}")


def _asked(store: StateStore, settings: Settings) -> Iterator[Finding]:
    try:
        if settings.store.startswith("sqlite:"):
            yield from ()
        else:
            yield from valkeys.check(settings.store, settings.store_timeout_s)
        probed = probe(store)
    except StoreUnavailable as error:
        yield bad(f"the store does not do what it is asked: {error}", "see to what it says; --store names the store")
        return
    told = (
        f"{store.name} has {probed.count:,} sessions; a read took {_ms(probed.read_s)}, a write {_ms(probed.write_s)}"
    )
    if max(probed.read_s, probed.write_s) > _SLOW_S:
        yield warning(told, "bring it nearer, or onto a faster disk: an answer of a sync session waits for a write")
    else:
        yield good(told)
    yield from _others(store)


def _others(store: StateStore) -> Iterator[Finding]:
    """Sessions that are from the future were made by a server whose clock is before ours."""
    now = time.time()
    ahead: dict[str, float] = {}
    records = store.listed("", _LOOKED_AT, "").records
    for record in records:
        try:
            content = head.decode(record.session_id, record.head)
        except head.HeadInvalid as error:
            yield warning(
                f"the record of session {record.session_id!r} {error}",
                "close that session: no server can go on with it",
            )
            continue
        ahead_s = content.created_at.ToNanoseconds() / 1e9 - now
        if ahead_s > _SKEW_S:
            ahead[record.owner] = max(ahead.get(record.owner, 0.0), ahead_s)
    for owner, ahead_s in sorted(ahead.items()):
        yield warning(
            f"{owner} has sessions that were made {ahead_s:.0f} s from now: its clock is ahead, or this one behind",
            "keep the clocks of all servers of the store right, with chrony for example",
        )
    if records and not ahead:
        yield good(f"no clock of another server is ahead, by the {len(records)} sessions that were looked at")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
