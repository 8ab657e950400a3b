"""The keys that snapshots are signed with.

Invariant: it says nothing of a key.
"""

import stat
from collections.abc import Iterator

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.errors import StartError
from conveyor_server.seal import read_keys
from conveyor_server.settings import Settings, is_loopback


def check(settings: Settings) -> Iterator[Finding]:
    """The file of keys, and who can read it."""
    path = settings.snapshot_keys
    if path is None:
        if is_loopback(settings.host):
            yield good("snapshots are not signed, and only this machine can bring one")
        else:
            yield warning(
                "snapshots are not signed: a client could bring a state that no model has had",
                "--snapshot-keys FILE (docs/security.md)",
            )
        return
    try:
        keys = read_keys(path)
    except StartError as error:
        yield bad(str(error), "correct the file; docs/security.md says what is in it")
        return
    yield good(f"snapshots are signed: {len(keys)} keys in {path}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        yield warning(
            f"{path} can be read by everybody (mode {mode:o})", f"chmod 640 {path}, of the server's own group"
        )
