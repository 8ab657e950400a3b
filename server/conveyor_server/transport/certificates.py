"""The certificate of a secure port, read anew when its files change: a renewal needs no restart.

Invariant: connections get a chain and a key that belong together. While the files cannot be used, new connections get
what was there before, and the log says why; those that are open keep what they began with.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from conveyor_server.errors import StartError
from conveyor_server.stamp import Stamp, stamp

_log = logging.getLogger("conveyor")


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for a secure port.

    Attributes:
        certificate, key: PEM, the chain and its private key.
        client_ca: PEM; clients must show a certificate that it signed. None: any client.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


class Certificates:
    """What new connections are given.

    Args:
        files: are looked at before each handshake, which takes microseconds while they are the same.

    Raises:
        StartError: they cannot be read, or do not fit.
    """

    def __init__(self, files: Tls) -> None:
        self._files = files
        self._stamp = self._look()
        try:
            self._first = self._read()
        except (OSError, ssl.SSLError) as error:
            raise StartError(_why(error)) from error

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a gRPC server."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._fetch,  # type: ignore[arg-type]  # None is said to be wrong, and documented
            require_client_authentication=self._files.client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, on a thread of its choice; None: there is nothing new."""
        found = self._look()
        if found == self._stamp:
            return None
        # Also where it is of no use: it is said once.
        self._stamp = found
        try:
            new = self._read()
        except (OSError, ssl.SSLError) as error:
            _log.warning("new connections get the former certificate: %s", _why(error))
            return None
        _log.info("new connections get the certificate that is in %s now", self._files.certificate)
        return new

    def _look(self) -> list[Stamp]:
        return [stamp(path) for path in (self._files.certificate, self._files.key, self._files.client_ca) if path]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """The files, which belong together.

        Raises:
            OSError: one cannot be read.
            ssl.SSLError: one is not what it should be, or the key is another certificate's.
        """
        files = self._files
        key, chain = files.key.read_bytes(), files.certificate.read_bytes()
        ca = None if files.client_ca is None else files.client_ca.read_bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A key with a password would have it asked for at the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], ca)


def _why(error: OSError | ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLError):
        why = error.reason or str(error)
        return (
            f"the TLS files do not fit ({why}): tls_certificate is the PEM chain of tls_key, which has no password; "
            "tls_client_ca is PEM certificates"
        )
    return f"cannot read {error.filename}: {error.strerror}"
