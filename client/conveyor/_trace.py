"""The trace of whoever calls, as metadata of the call: W3C's, or what the app's propagators say.

Invariant: OpenTelemetry is the app's. Where the app has not imported it, there is no trace to go on with, and nothing
of it is imported here.
"""

import sys

from conveyor._io.base import Metadata


def of_caller() -> Metadata:
    """Of which trace the caller is, in whose thread or task this is asked; nothing: of none."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [(key.lower(), value) for key, value in carrier.items()]


def joined(metadata: Metadata, trace: Metadata) -> Metadata:
    """A call's metadata, and of which trace it is, unless that is said there."""
    said = {key for key, _ in metadata}
    return [*metadata, *(pair for pair in trace if pair[0] not in said)] if trace else metadata
