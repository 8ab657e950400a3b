"""Encrypted connections: whom the client trusts, by which name, and what it shows of itself."""

import conveyor
import conveyor.aio
import pytest
import trustme
from conveyor.cli.main import main


@pytest.fixture
def identity(authority):
    """A client's certificate chain and key, PEM."""
    certificate = authority.issue_cert("client.example")
    return b"".join(blob.bytes() for blob in certificate.cert_chain_pems), certificate.private_key_pem.bytes()


@pytest.fixture
def tls(authority, identity):
    chain, key = identity
    return conveyor.TLS(
        root_certificates=authority.cert_pem.bytes(),
        certificate=chain,
        private_key=key,
        server_name="models.example",
    )


def test_both_sides_show_certificates(tls_server, tls):
    with conveyor.connect(tls_server.target, tls=tls) as client, client.session("sum") as s:
        assert s.step([1, 2]).tolist() == [1, 2]


async def test_with_asyncio(tls_server, tls):
    async with conveyor.aio.connect(tls_server.target, tls=tls) as client, client.session("sum") as s:
        assert (await s.step([1, 2])).tolist() == [1, 2]


@pytest.mark.parametrize("wrong", ["authority", "name", "no certificate", "not encrypted"])
def test_nobody_else_is_talked_to(tls_server, authority, identity, wrong):
    roots = trustme.CA() if wrong == "authority" else authority
    chain, key = (None, None) if wrong == "no certificate" else identity
    tls = conveyor.TLS(
        root_certificates=roots.cert_pem.bytes(),
        certificate=chain,
        private_key=key,
        server_name="other.example" if wrong == "name" else "models.example",
    )
    with (
        conveyor.connect(
            tls_server.target, tls=None if wrong == "not encrypted" else tls, connect_timeout_s=0
        ) as client,
        pytest.raises(conveyor.ConnectionLost),
    ):
        client.models()


def test_the_command_line_takes_files(tls_server, authority, identity, tmp_path, capsys):
    paths = {}
    for name, pem in (("ca", authority.cert_pem.bytes()), ("cert", identity[0]), ("key", identity[1])):
        paths[name] = tmp_path / f"{name}.pem"
        paths[name].write_bytes(pem)
    options = [argument for name, path in paths.items() for argument in (f"--{name}", str(path))]
    options += ["--server-name", "models.example"]
    assert main(["models", "--target", tls_server.target, *options]) == 0
    assert "sum" in capsys.readouterr().out
