"""All checks, in the order in which they are told.

Invariant: docs/doctor.md has a row for each of them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from conveyor_server.doctor import (
    access,
    certificates,
    clock,
    collector,
    devices,
    keys,
    limits,
    models,
    ports,
    runtime,
    stores,
)
from conveyor_server.doctor.finding import Finding, bad
from conveyor_server.settings import Settings

Check: TypeAlias = Callable[[Settings], Iterator[Finding]]

CHECKS: Mapping[str, Check] = {
    "runtime": runtime.check,
    "ports": ports.check,
    "certificates": certificates.check,
    "access": access.check,
    "keys": keys.check,
    "models": models.check,
    "device": devices.check,
    "store": stores.check,
    "clock": clock.check,
    "collector": collector.check,
    "limits": limits.check,
}


def run(settings: Settings) -> Iterator[tuple[str, Finding]]:
    """All findings, each with its check's name. What a check cannot even look at is a finding too."""
    for name, check in CHECKS.items():
        try:
            for finding in check(settings):
                yield name, finding
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
            yield name, bad(f"it cannot be looked at: {what}{where}", "run doctor as the user that the server runs as")
