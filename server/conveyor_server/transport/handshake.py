"""A handshake in memory: what a client would find in a server's TLS files.

Invariant: nothing is decoded by hand, and nothing is sent.
"""

import ssl
from typing import Any

from conveyor_server.transport.certificates import Tls

# X509_V_FLAG_NO_CHECK_TIME: an expired certificate is to be read, too. The module has no name for it.
_WHENEVER = 0x200000


def handshake(files: Tls, trusted: str, name: str) -> dict[str, Any]:
    """A handshake in memory between the files and a client that trusts these certificates and looks at no clock.

    Args:
        files: of the server.
        trusted: PEM.
        name: that the client knows the server by; "": it looks at none.

    Raises:
        ssl.SSLError: the client does not accept it.
    """
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(files.certificate, files.key, password="")
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.check_hostname = bool(name)
    calling.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _WHENEVER)
    calling.load_verify_locations(cadata=trusted)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(up, down, server_side=True)
    client = calling.wrap_bio(down, up, server_hostname=name or None)
    ends = [client, server]
    while ends:
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
    return dict(client.getpeercert() or {})
