"""What a server that begins says of its doors: who may come in, and what is open to whom.

Invariant: what strangers can reach is said at every start, whether it was meant or not.
"""

from collections.abc import Sequence

from conveyor_server.identity.access import Access
from conveyor_server.settings import Settings, is_loopback


def offers_admin(settings: Settings) -> bool:
    """Calls that change what is served are answered."""
    if settings.admin == "auto":
        return is_loopback(settings.host) or settings.access is not None or settings.tls_client_ca is not None
    return settings.admin == "on"


def banner(settings: Settings, access: Access | None) -> Sequence[str]:
    """Lines for the log.

    Args:
        settings: of the server.
        access: what its access file says; None: there is none.
    """
    local = is_loopback(settings.host)
    return [
        f"who may call: {_callers(settings, access, local=local)}",
        f"open: {_wire(settings, local=local)}; calls that change what is served are "
        f"{'on' if offers_admin(settings) else 'off'}, reflection is {'on' if settings.reflection else 'off'}; "
        f"{_pages(settings, access)}",
        f"snapshots are {'signed' if settings.snapshot_keys else 'not signed (--snapshot-keys)'}",
    ]


def _callers(settings: Settings, access: Access | None, *, local: bool) -> str:
    certified = "" if settings.tls_client_ca is None else f", with a certificate by {settings.tls_client_ca}"
    if access is not None:
        return access.describe() + certified
    if certified:
        return f"anybody{certified}"
    return "anybody on this machine" if local else "anybody who reaches the port"


def _wire(settings: Settings, *, local: bool) -> str:
    if settings.tls_key is not None:
        return "gRPC over TLS"
    if local:
        return "gRPC in the clear, on this machine"
    shown = "inputs, answers and tokens" if settings.access is not None else "inputs and answers"
    return f"gRPC in the clear: {shown} can be read on their way (--tls-certificate, --tls-key)"


def _pages(settings: Settings, access: Access | None) -> str:
    host = settings.metrics_host or settings.host
    who = "whoever may observe" if access is not None else "anybody"
    return f"metrics for {who} {'on this machine' if is_loopback(host) else f'who reaches {host}'}, in the clear"
