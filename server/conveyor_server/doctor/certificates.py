"""The TLS files: whether they belong together, what for and until when, as a client would find out.

Invariant: nothing is decoded by hand: a handshake in memory, with the very files, says what a real one would.
"""

import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings, is_loopback
from conveyor_server.transport.certificates import Certificates, Tls
from conveyor_server.transport.handshake import handshake

_DAY_S = 86_400.0
_SOON_S = 30 * _DAY_S
_RENEW = "renew it; a running server takes the new files by itself"
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def check(settings: Settings) -> Iterator[Finding]:
    """The chain, its key, and the clients' authority."""
    if settings.tls_certificate is None or settings.tls_key is None:
        yield _without(settings)
        return
    files = Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    try:
        Certificates(files)
    except StartError as error:
        yield bad(str(error), "give files that fit; openssl x509 -in FILE -text and openssl pkey -in FILE show them")
        return
    yield good(f"{files.key} is the key of {files.certificate}")
    yield from _key_file(files.key)
    leaf = _peer(files, trusted=files.certificate)
    yield from _times(f"the certificate {files.certificate}", leaf)
    yield from _chain(files)
    yield from _names(files, leaf, settings.host)
    if files.client_ca is not None:
        for authority in _authorities(files.client_ca.read_text()):
            yield from _times(f"the clients' authority {_common_name(authority)} in {files.client_ca}", authority)


def _without(settings: Settings) -> Finding:
    if is_loopback(settings.host):
        return good(f"no TLS, and {settings.host} is reached from this machine only")
    return warning(
        f"no TLS on {settings.host}: what clients send and get can be read on its way",
        "--tls-certificate and --tls-key, or see to it that only a proxy with TLS reaches the port (docs/security.md)",
    )


def _key_file(key: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        yield warning(f"{key} can be read by everybody (mode {mode:o})", f"chmod 640 {key}, of the server's own group")


def _times(what: str, certificate: dict[str, Any]) -> Iterator[Finding]:
    now = time.time()
    begins, ends = (ssl.cert_time_to_seconds(certificate[name]) for name in ("notBefore", "notAfter"))
    if ends <= now:
        yield bad(f"{what} expired on {certificate['notAfter']}", _RENEW)
    elif begins > now:
        yield bad(f"{what} is not valid before {certificate['notBefore']}", "look at this machine's clock, or wait")
    elif ends - now < _SOON_S:
        yield warning(f"{what} expires in {(ends - now) / _DAY_S:.0f} days, on {certificate['notAfter']}", _RENEW)
    else:
        yield good(f"{what} is valid for {(ends - now) / _DAY_S:.0f} days")


def _chain(files: Tls) -> Iterator[Finding]:
    """Each certificate of the file is signed by the next: whoever trusts the last, or its issuer, gets to the first."""
    blocks = _blocks(files.certificate.read_text())
    issuers = [authority for block in blocks[1:] for authority in _authorities(block)]
    for issuer in issuers:
        yield from _times(f"the intermediate {_common_name(issuer)} in {files.certificate}", issuer)
    try:
        handshake(files, blocks[-1], "")
    except ssl.SSLError as error:
        yield bad(
            f"the certificates in {files.certificate} are no chain ({_reason(error)})",
            "put the server's first, and after each the one that signed it",
        )
        return
    if len(blocks) > 1:
        yield good(f"{len(blocks)} certificates in {files.certificate} are a chain")


def _names(files: Tls, leaf: dict[str, Any], host: str) -> Iterator[Finding]:
    names = [value for _, value in leaf.get("subjectAltName", ())]
    if not names:
        yield bad(
            f"{files.certificate} has no subjectAltName, and clients look at nothing else",
            "have it issued for the names and addresses that clients use",
        )
        return
    told = ", ".join(names)
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - nothing is bound
        yield good(f"{files.certificate} is for {told}; {socket.gethostname()} is this machine's name")
        return
    try:
        handshake(files, files.certificate.read_text(), host)
    except ssl.SSLError as error:
        yield warning(
            f"{files.certificate} is for {told}, not for {host}, where the server listens ({_reason(error)})",
            "have it issued for what clients call the server, or let them say --server-name",
        )
    else:
        yield good(f"{files.certificate} is for {told}")


def _peer(files: Tls, *, trusted: Path) -> dict[str, Any]:
    """The first certificate, as a client sees it that trusts it."""
    return handshake(files, trusted.read_text(), "")


def _blocks(text: str) -> list[str]:
    """Each certificate of a PEM file by itself."""
    return [f"{_BEGIN}{part.partition(_END)[0]}{_END}\n" for part in text.split(_BEGIN)[1:]]


def _authorities(text: str) -> list[dict[str, Any]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=text)
    return [dict(found) for found in context.get_ca_certs()]


def _common_name(certificate: dict[str, Any]) -> str:
    parts = [f"{key}={value}" for group in certificate.get("subject", ()) for key, value in group]
    return repr(", ".join(parts))


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", "") or error.reason or str(error)
