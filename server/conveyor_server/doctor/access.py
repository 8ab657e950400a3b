"""Who may call: whether the access file can be used, and what it lets in.

Invariant: it says no token and no digest of one.
"""

from collections.abc import Iterator

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.errors import StartError
from conveyor_server.identity.access import read_access
from conveyor_server.settings import Settings, is_loopback


def check(settings: Settings) -> Iterator[Finding]:
    """The access file; without one, who is let in."""
    if settings.access is None:
        if settings.tls_client_ca is not None:
            yield good("no access file: whoever has a client's certificate may call")
        elif is_loopback(settings.host):
            yield good("no access file: whoever is on this machine may call")
        else:
            yield warning(
                f"no access file, and {settings.host} is reached from elsewhere: whoever does may call",
                "--access FILE with tokens, or --tls-client-ca (docs/security.md)",
            )
        return
    try:
        access = read_access(settings.access)
    except StartError as error:
        yield bad(str(error), "correct the file; docs/security.md says what may be in it")
        return
    if not (access.tokens or access.certificates or access.issuer or access.anonymous):
        yield bad(f"{settings.access} lets nobody in", "`conveyor token new` makes a token and what to write there")
        return
    yield good(f"{settings.access}: {access.describe()}")
    if access.certificates and settings.tls_client_ca is None:
        yield warning(
            f"{settings.access} names certificates, and clients are asked for none",
            "--tls-client-ca says whose certificates count",
        )
