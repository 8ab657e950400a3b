"""What `conveyor doctor` finds of files: certificates, the access file, the models' folder; each good and not."""

import datetime
import os
import re

import onnx
import pytest
import trustme
from conveyor_proto.spec import METADATA_KEY
from conveyor_server.doctor import access, certificates, keys, models
from conveyor_server.doctor.finding import Level
from conveyor_server.settings import Settings
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens
GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
NOW = datetime.datetime.now(datetime.UTC)


def told(check, settings):
    """Findings as (level, text), the text with what to do."""
    return [(each.level, f"{each.what} -> {each.fix}") for each in check(settings)]


def levels(check, settings):
    return [each.level for each in check(settings)]


def only(found, level):
    (text,) = (text for each, text in found if each is level)
    return text


# ---------------------------------------------------------------- certificates


def write(folder, issued, **kwargs):
    """Writes a chain and its key; returns settings of it."""
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    key.chmod(0o600)
    return Settings(tls_certificate=chain, tls_key=key, **kwargs)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def test_a_whole_set_of_files_is_good(tmp_path, authority):
    clients = tmp_path / "clients.pem"
    authority.cert_pem.write_to_path(str(clients))
    settings = write(
        tmp_path,
        authority.issue_cert("localhost", "127.0.0.1", not_after=NOW + datetime.timedelta(300)),
        tls_client_ca=clients,
    )
    found = told(certificates.check, settings)
    assert {level for level, _ in found} == {GOOD}, found
    text = "\n".join(text for _, text in found)
    for words in ("is the key of", "valid for 300 days", "for localhost, 127.0.0.1", "the clients' authority"):
        assert words in text


@pytest.mark.parametrize(
    ("begins", "ends", "level", "words"),
    [(-10, -1, BAD, "expired on"), (-10, 5, WARNING, "expires in"), (2, 300, BAD, "not valid before")],
)
def test_times(tmp_path, authority, begins, ends, level, words):
    span = [NOW + datetime.timedelta(days, hours=1) for days in (begins, ends)]
    issued = authority.issue_cert("localhost", "127.0.0.1", not_before=span[0], not_after=span[1])
    assert words in only(told(certificates.check, write(tmp_path, issued)), level)


def test_a_key_of_another_certificate_and_files_that_are_none(tmp_path, authority):
    settings = write(tmp_path, authority.issue_cert("localhost"))
    settings.tls_key.write_bytes(authority.issue_cert("localhost").private_key_pem.bytes())
    assert "do not fit" in only(told(certificates.check, settings), BAD)
    settings.tls_key.unlink()
    assert "cannot read" in only(told(certificates.check, settings), BAD)


def test_a_key_for_everybody(tmp_path, authority):
    settings = write(tmp_path, authority.issue_cert("127.0.0.1", not_after=NOW + datetime.timedelta(300)))
    settings.tls_key.chmod(0o644)
    assert "chmod 640" in only(told(certificates.check, settings), WARNING)


def test_names_that_are_not_the_servers(tmp_path, authority):
    issued = authority.issue_cert("models.example", not_after=NOW + datetime.timedelta(300))
    assert "not for 127.0.0.1" in only(told(certificates.check, write(tmp_path, issued)), WARNING)
    everywhere = write(tmp_path, issued, host=EVERYWHERE)
    assert set(levels(certificates.check, everywhere)) == {GOOD}


def test_a_chain_and_certificates_that_are_none(tmp_path, authority):
    between = authority.create_child_ca()
    settings = write(tmp_path, between.issue_cert("127.0.0.1", not_after=NOW + datetime.timedelta(300)))
    found = told(certificates.check, settings)
    assert {level for level, _ in found} == {GOOD}
    assert any("2 certificates" in text and "are a chain" in text for _, text in found)
    assert any("the intermediate" in text for _, text in found)
    leaf, rest = settings.tls_certificate.read_text().split("-----END CERTIFICATE-----\n", 1)
    assert rest
    stranger = trustme.CA().cert_pem.bytes().decode()
    settings.tls_certificate.write_text(f"{leaf}-----END CERTIFICATE-----\n{stranger}")
    assert "are no chain" in only(told(certificates.check, settings), BAD)


def test_a_certificate_without_names(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 7)
        .not_valid_before(NOW - datetime.timedelta(1))
        .not_valid_after(NOW + datetime.timedelta(300))
        .sign(key, hashes.SHA256())
    )
    settings = Settings(tls_certificate=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem")
    settings.tls_certificate.write_bytes(made.public_bytes(Encoding.PEM))
    settings.tls_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    settings.tls_key.chmod(0o600)
    assert "no subjectAltName" in only(told(certificates.check, settings), BAD)


def test_without_tls():
    assert levels(certificates.check, Settings()) == [GOOD]
    assert "can be read on its way" in only(told(certificates.check, Settings(host=EVERYWHERE)), WARNING)


# ---------------------------------------------------------------- who may call

TOKEN = f'[[tokens]]\nname = "ada"\nsha256 = "{"a" * 64}"\ntenant = "one"\nroles = ["infer"]\n'
CERTIFICATE = '[[certificates]]\nname = "line.example"\ntenant = "one"\nroles = ["infer"]\n'


def test_access(tmp_path):
    file = tmp_path / "access.toml"
    file.write_text(TOKEN)
    (found,) = told(access.check, Settings(access=file))
    assert found[0] is GOOD
    assert "a" * 64 not in found[1]
    file.write_text("")
    assert "lets nobody in" in only(told(access.check, Settings(access=file)), BAD)
    file.write_text("nonsense = 1")
    assert "nonsense" in only(told(access.check, Settings(access=file)), BAD)
    file.write_text(CERTIFICATE)
    assert "asked for none" in only(told(access.check, Settings(access=file)), WARNING)
    assert levels(access.check, Settings(access=file, tls_client_ca=file)) == [GOOD]


def test_without_access():
    assert levels(access.check, Settings()) == [GOOD]
    assert levels(access.check, Settings(host=EVERYWHERE, tls_client_ca="x")) == [GOOD]
    assert "whoever does may call" in only(told(access.check, Settings(host=EVERYWHERE)), WARNING)


def test_keys_of_snapshots(tmp_path):
    file = tmp_path / "keys"
    assert levels(keys.check, Settings()) == [GOOD]
    assert "--snapshot-keys" in only(told(keys.check, Settings(host=EVERYWHERE)), WARNING)
    assert "keys" in only(told(keys.check, Settings(snapshot_keys=file)), BAD)
    file.write_text("ab" * 32 + "\n")
    file.chmod(0o600)
    (found,) = told(keys.check, Settings(snapshot_keys=file))
    assert found[0] is GOOD
    assert "abab" not in found[1]
    file.chmod(0o644)
    assert "chmod 640" in only(told(keys.check, Settings(snapshot_keys=file)), WARNING)
    file.write_text("short\n")
    assert "short" not in only(told(keys.check, Settings(snapshot_keys=file)), BAD)


# ---------------------------------------------------------------- models


@pytest.fixture
def folder(tmp_path, model_file):
    root = tmp_path / "models"
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "1" / "model.onnx").write_bytes(model_file)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    import torch
    from conveyor_export import export

    folder = tmp_path_factory.mktemp("exported")
    module = torch.nn.GRU(2, 3, batch_first=True).eval()
    export(module, torch.zeros(2, 3, 2), folder / "m" / "1", quiet=True)
    return (folder / "m" / "1" / "model.onnx").read_bytes()


def test_a_model_that_can_be_served(folder):
    ((level, text),) = told(models.check, Settings(models=folder))
    assert level is GOOD
    assert "m/1: 12 bytes of state a session, digest " in text
    (found,) = models.readable(Settings(models=folder))
    assert (found.name, found.version, found.state_bytes) == ("m", "1", 12)
    assert found.file_bytes == (folder / "m/1/model.onnx").stat().st_size


def test_no_folder_and_an_empty_one(tmp_path):
    gone = Settings(models=tmp_path / "gone")
    assert "--models" in only(told(models.check, gone), BAD)
    assert models.readable(gone) == []
    (tmp_path / "empty").mkdir(mode=0o755)
    assert "serves nothing" in only(told(models.check, Settings(models=tmp_path / "empty")), WARNING)


def test_a_file_that_is_cut_short_leaves_the_others_good(folder, model_file):
    (folder / "m" / "2").mkdir(mode=0o755)
    (folder / "m" / "2" / "model.onnx").write_bytes(model_file[: len(model_file) // 2])
    found = told(models.check, Settings(models=folder))
    assert sorted(level for level, _ in found) == [GOOD, BAD]
    assert "m/2:" in only(found, BAD)
    assert [each.version for each in models.readable(Settings(models=folder))] == ["1"]


def test_weights_beside_the_file(folder, model_file):
    path = folder / "m" / "1" / "model.onnx"
    proto = onnx.load_from_string(model_file)
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert "1 files of weights beside it" in only(told(models.check, Settings(models=folder)), GOOD)
    (folder / "m" / "1" / "w.bin").unlink()
    assert "w.bin" in only(told(models.check, Settings(models=folder)), BAD)


def test_a_model_without_a_digest(folder, model_file):
    proto = onnx.load_from_string(model_file)
    (item,) = (item for item in proto.metadata_props if item.key == METADATA_KEY)
    item.value = re.sub(r'"digest":\s*"\w+",?', "", item.value)
    onnx.save(proto, folder / "m" / "1" / "model.onnx")
    assert "has no digest" in only(told(models.check, Settings(models=folder)), WARNING)


def test_what_is_passed_over(folder, model_file):
    (folder / "m" / "v2").mkdir(mode=0o755)
    (folder / "m" / "3").mkdir(mode=0o755)
    (folder / "a b").mkdir(mode=0o755)
    (folder / "flat").mkdir(mode=0o755)
    (folder / "flat" / "model.onnx").write_bytes(model_file)
    for name in (".git", "m.tmp", "m/.upload"):
        (folder / name / "x").mkdir(mode=0o755, parents=True)
    texts = [text for level, text in told(models.check, Settings(models=folder)) if level is WARNING]
    assert len(texts) == 4, texts
    for words in (
        "v2 is passed over: a version",
        "3 is passed over: no model.onnx",
        "a b is passed",
        "in no version's",
    ):
        assert any(words in text for text in texts), words


def test_a_folder_that_everybody_may_change(folder):
    (folder / "m").chmod(0o777)
    assert f"may change {folder / 'm'}" in only(told(models.check, Settings(models=folder)), WARNING)
    (folder / "m").chmod(0o1777)
    assert set(levels(models.check, Settings(models=folder))) == {GOOD}, "nobody replaces another's files there"
    assert os.access(folder, os.R_OK)
