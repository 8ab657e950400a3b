"""Certificates that are renewed while the server runs: who comes gets the new one, and who is there goes on."""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import conveyor
import numpy as np
import pytest
import trustme

from tests.e2e.conftest import FEATURES, Server, launch

X = np.random.default_rng(51).standard_normal((40, FEATURES)).astype(np.float32)
PATIENCE_S = 20.0


class Files:
    """A server's files, each replaced at once."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.client_ca = (folder / name for name in ("chain.pem", "key.pem", "ca.pem"))

    def renew(self, authority: trustme.CA) -> int:
        """Puts a new certificate there, and returns its serial number."""
        issued = authority.issue_cert("localhost")
        # In this order, so that for a moment the key is another certificate's.
        self.put(self.certificate, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.put(self.key, issued.private_key_pem.bytes())
        return int(ssl_serial(issued.cert_chain_pems[0].bytes().decode()), 16)

    def trust(self, clients: trustme.CA) -> None:
        self.put(self.client_ca, clients.cert_pem.bytes())

    @staticmethod
    def put(path: Path, content: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(path)


def ssl_serial(pem: str) -> str:
    from cryptography import x509

    return f"{x509.load_pem_x509_certificate(pem.encode()).serial_number:x}"


class Clients:
    """A client's files, signed by an authority of clients."""

    def __init__(self, authority: trustme.CA, server_authority: trustme.CA, folder: Path) -> None:
        issued = authority.issue_cert("client@models.example")
        self.ca, self.cert, self.key = (folder / name for name in ("server-ca.pem", "client.pem", "client-key.pem"))
        folder.mkdir()
        server_authority.cert_pem.write_to_path(str(self.ca))
        issued.cert_chain_pems[0].write_to_path(str(self.cert))
        issued.private_key_pem.write_to_path(str(self.key))

    def serial(self, port: int) -> int | None:
        """The serial number of the certificate that a new connection is shown; None: the server does not let it in."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(self.cert, self.key)
        with (
            socket.create_connection(("localhost", port), timeout=PATIENCE_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            shown = secure.getpeercert()
            # With TLS 1.3, a server that does not want the client hangs up after the handshake; else it greets.
            try:
                greeted = secure.recv(1)
            except (ssl.SSLError, ConnectionError):
                greeted = b""
        if not greeted:
            return None
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)

    def connect(self, port: int) -> conveyor.Client:
        tls = conveyor.TLS(root_certificates=self.ca, certificate=self.cert, private_key=self.key)
        return conveyor.connect(f"localhost:{port}", tls=tls)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def secure(nets, tmp_path: Path, transport: str, files: Files) -> Iterator[Callable[[], Server]]:
    """Starts a server with these files."""
    started: list[Server] = []

    def start() -> Server:
        flags = ["--tls-certificate", files.certificate, "--tls-key", files.key, "--tls-client-ca", files.client_ca]
        server = launch(nets.folder, tmp_path, "--transport", transport, *map(str, flags))
        started.append(server)
        until = time.monotonic() + 60
        while "ready: grpc" not in server.log.read_text():
            assert time.monotonic() < until, server.log.read_text()
            time.sleep(0.05)
        return server

    yield start
    for server in started:
        assert server.stop() == 0


def test_a_renewed_certificate_is_shown_to_who_comes_and_disturbs_nobody_who_is_there(
    secure, files: Files, authority: trustme.CA, tmp_path: Path, nets
) -> None:
    clients = trustme.CA()
    first = files.renew(authority)
    files.trust(clients)
    server, ours = secure(), Clients(clients, authority, tmp_path / "ours")
    want = nets.truth("lstm", X)
    with ours.connect(server.port) as client, client.session("lstm") as session:
        got = [session.step(x) for x in X[:10]]
        assert ours.serial(server.port) == first
        second = files.renew(authority)
        assert second != first
        assert ours.serial(server.port) == second
        got += [session.step(x) for x in X[10:20]]
        with ours.connect(server.port) as newcomer, newcomer.session("lstm") as other:
            np.testing.assert_allclose(other.step(X[0]), want[0], atol=1e-5)

        files.put(files.key, b"no key")
        for _ in range(2):
            assert ours.serial(server.port) == second
        assert server.log.read_text().count("new connections get the former certificate: the TLS files do not fit") == 1
        files.key.unlink()
        assert ours.serial(server.port) == second
        assert f"former certificate: cannot read {files.key}" in server.log.read_text()

        third = files.renew(authority)
        assert ours.serial(server.port) == third
        got += [session.step(x) for x in X[20:]]
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)


def test_who_may_come_is_what_the_file_says_now(secure, files: Files, authority: trustme.CA, tmp_path: Path) -> None:
    former, latter = trustme.CA(), trustme.CA()
    serial = files.renew(authority)
    files.trust(former)
    server = secure()
    one, other = (Clients(ca, authority, tmp_path / name) for ca, name in ((former, "one"), (latter, "other")))
    assert one.serial(server.port) == serial
    assert other.serial(server.port) is None
    files.trust(latter)
    assert other.serial(server.port) == serial
    assert one.serial(server.port) is None
