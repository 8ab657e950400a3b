"""The machine's clock: stored sessions, certificates and tokens are judged by it.

Invariant: what cannot be asked here, in a container for example, is said not to be known, and is no finding against it.
"""

import ctypes
import errno
from collections.abc import Iterator

from conveyor_server.doctor.finding import Finding, good, warning
from conveyor_server.settings import Settings

# adjtimex(2): what it returns while nothing keeps the clock right.
_UNSYNCHRONISED = 5
# Larger than struct timex is on any Linux.
_TIMEX_BYTES = 512


def check(settings: Settings) -> Iterator[Finding]:
    """Whether something keeps it right."""
    yield judged(_state(), several=settings.store.partition(":")[0] not in {"memory", "sqlite"})


def judged(state: int | str, *, several: bool) -> Finding:
    """What the kernel's word means.

    Args:
        state: as adjtimex returns it, or why it was not to be had.
        several: servers on other machines share the store.
    """
    if isinstance(state, str):
        return good(f"whether this machine's clock is kept right cannot be asked here ({state})")
    if state != _UNSYNCHRONISED:
        return good("this machine's clock is kept right")
    if not several:
        return good("nothing that the kernel knows of keeps this machine's clock right; one server alone does without")
    return warning(
        "nothing that the kernel knows of keeps this machine's clock right, and servers that share a store tell "
        "sessions of one name apart by their clocks",
        "run chrony or systemd-timesyncd on every machine (in a container: on its host)",
    )


def _state() -> int | str:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "adjtimex"):
        return "there is no adjtimex"
    # Zeros ask and set nothing.
    state: int = library.adjtimex(ctypes.byref((ctypes.c_ubyte * _TIMEX_BYTES)()))
    return state if state >= 0 else errno.errorcode.get(ctypes.get_errno(), "it failed")
