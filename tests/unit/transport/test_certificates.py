"""What is said of TLS files that a server cannot begin with. (What becomes of them later is tests/e2e's.)"""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from conveyor_server.errors import StartError
from conveyor_server.transport.certificates import Certificates, Tls
from conveyor_server.transport.expiry import Expiry
from cryptography.hazmat.primitives import serialization


@pytest.fixture
def files(tmp_path: Path) -> Tls:
    """A server's, all good."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    tls = Tls(tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(str(tls.certificate))
    issued.private_key_pem.write_to_path(str(tls.key))
    authority.cert_pem.write_to_path(str(tls.client_ca))
    return tls


def locked(key: Path) -> bytes:
    """A private key's file, with a password."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return private.private_bytes(kind, form, serialization.BestAvailableEncryption(b"secret"))


def test_good_ones_are_good(files: Tls) -> None:
    assert Certificates(files).credentials() is not None


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_one_that_is_not_there_is_named(files: Tls, name: str) -> None:
    path: Path = getattr(files, name)
    path.unlink()
    with pytest.raises(StartError, match=f"cannot read {path}: No such file"):
        Certificates(files)


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_one_that_is_something_else_is_refused(files: Tls, name: str, content: bytes) -> None:
    getattr(files, name).write_bytes(content)
    with pytest.raises(StartError, match=r"the TLS files do not fit .*tls_certificate is the PEM chain of tls_key"):
        Certificates(files)


def test_a_key_of_another_certificate_is_refused(files: Tls) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(files.key))
    with pytest.raises(StartError, match="KEY_VALUES_MISMATCH"):
        Certificates(files)


def test_a_key_with_a_password_is_refused_and_nobody_asked_for_it(files: Tls) -> None:
    files.key.write_bytes(locked(files.key))
    with pytest.raises(StartError, match="which has no password"):
        Certificates(files)


def issue(files: Tls, *until: datetime) -> None:
    """New files in the place of the former: a chain of a certificate up to a day, and its authority's."""
    authority = trustme.CA()
    for day in until:
        issued = authority.issue_cert("localhost", not_after=day)
        files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(files.key))


def test_until_when_a_certificate_is_valid_is_told_and_told_anew_after_a_renewal(files: Tls) -> None:
    expiry = Expiry(files)
    for day in (datetime(2035, 5, 17, tzinfo=UTC), datetime(2036, 5, 17, tzinfo=UTC)):
        issue(files, day)
        assert expiry.at() == expiry.at() == day.timestamp()


def test_one_that_has_expired_is_told_as_well(files: Tls) -> None:
    day = datetime(2021, 5, 17, tzinfo=UTC)
    issue(files, day)
    assert Expiry(files).at() == day.timestamp()


def test_files_of_no_use_leave_what_was_told(files: Tls) -> None:
    day = datetime(2035, 5, 17, tzinfo=UTC)
    issue(files, day)
    expiry = Expiry(files)
    assert expiry.at() == day.timestamp()
    for content in (b"no PEM", b"\xff\xfe"):
        files.certificate.write_bytes(content)
        assert expiry.at() == day.timestamp()
    files.certificate.unlink()
    assert expiry.at() == day.timestamp()
    assert Expiry(files).at() is None


def test_without_tls_nothing_ends() -> None:
    assert Expiry(None).at() is None
