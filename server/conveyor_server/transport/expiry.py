"""Until when the port's certificate is valid, for whoever watches.

Invariant: files are looked at again only when they have changed; so a scrape costs two looks at the disk.
"""

import ssl

from conveyor_server.stamp import Stamp, stamp
from conveyor_server.transport.certificates import Tls
from conveyor_server.transport.handshake import handshake


class Expiry:
    """Until when the port's certificate is valid. Core thread only.

    Args:
        files: of the port; None: it has no TLS.
    """

    def __init__(self, files: Tls | None) -> None:
        self._files = files
        self._stamps: list[Stamp] = []
        self._at: float | None = None

    def at(self) -> float | None:
        """Unix seconds; None: there is no certificate, or none that a client could be shown.

        Files that cannot be used now change nothing: new connections get the former ones as well.
        """
        if self._files is None:
            return None
        found = [stamp(self._files.certificate), stamp(self._files.key)]
        if found != self._stamps:
            self._stamps = found
            try:
                leaf = handshake(self._files, self._files.certificate.read_text(), "")
            except (OSError, ValueError):
                # ssl.SSLError is an OSError. The log has it from whoever gives the files to connections.
                return self._at
            self._at = float(ssl.cert_time_to_seconds(leaf["notAfter"]))
        return self._at
