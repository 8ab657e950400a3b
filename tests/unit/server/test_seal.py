"""A snapshot that is signed was signed here: whatever a client makes of one, or makes up, is refused."""

import base64
import hashlib
import hmac
from pathlib import Path

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_server.errors import Refused, StartError
from conveyor_server.seal import MAGIC, SIGNED, Seal

CONTENT = b"a session's state"
A, B = bytes(range(1, 33)), bytes(range(100, 148))


def text(*keys: bytes) -> str:
    return "# keys\n\n" + "".join(base64.b64encode(key).decode() + "\n" for key in keys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(text(A))
    return path


def put(path: Path, content: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(content)
    new.replace(path)


def refused(seal: Seal, data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        seal.open(data)
    assert caught.value.fault.reason == e.ERROR_REASON_SNAPSHOT_INVALID
    return caught.value.fault.message


def test_round_trips(file: Path) -> None:
    plain, signed = Seal(), Seal(file)
    assert plain.open(plain.close(CONTENT)) == CONTENT
    assert signed.open(signed.close(CONTENT)) == CONTENT
    assert Seal(file).open(signed.close(CONTENT)) == CONTENT
    assert signed.open(signed.close(b"")) == b""


def test_what_is_not_signed_here_is_refused(file: Path, tmp_path: Path) -> None:
    signed = Seal(file)
    other = tmp_path / "others"
    other.write_text(text(B))
    assert "is not signed" in refused(signed, Seal().close(CONTENT))
    assert "does not have" in refused(signed, Seal(other).close(CONTENT))
    assert "no keys" in refused(Seal(), signed.close(CONTENT))
    # The id of a key tells nothing of it, and whoever knows it still has no key.
    name = hashlib.sha256(A).digest()[:8]
    forged = SIGNED + name + hmac.digest(B, name + CONTENT, "sha256") + CONTENT
    assert "signature does not fit" in refused(signed, forged)
    for data in (b"", b"CV", MAGIC, SIGNED, SIGNED + name, b"else" + CONTENT * 9):
        refused(signed, data)
        refused(Seal(), data)


def test_every_changed_bit_is_seen(file: Path) -> None:
    for seal in (Seal(), Seal(file)):
        data = seal.close(CONTENT)
        for index in range(len(data)):
            for bit in (1, 128):
                broken = bytearray(data)
                broken[index] ^= bit
                refused(seal, bytes(broken))
        for cut in range(len(data)):
            refused(seal, data[:cut])
        refused(seal, data + b"\0")


def test_a_key_is_replaced_while_snapshots_of_both_are_about(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "conveyor")
    seal = Seal(file)
    old = seal.close(CONTENT)
    put(file, text(B, A))
    new = seal.close(CONTENT)
    assert new != old
    assert seal.open(old) == seal.open(new) == CONTENT
    put(file, "no key")
    assert seal.open(old) == CONTENT
    assert seal.close(CONTENT) == new
    file.unlink()
    assert seal.open(old) == CONTENT
    put(file, text(B))
    assert "does not have" in refused(seal, old)
    assert seal.open(new) == CONTENT
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "ERROR", "INFO"]


@pytest.mark.parametrize(
    "form", [A.hex(), base64.urlsafe_b64encode(A).decode(), base64.b64encode(A).decode().rstrip("=")]
)
def test_forms_of_a_key(file: Path, form: str) -> None:
    data = Seal(file).close(CONTENT)
    put(file, f"  {form}\r\n")
    assert Seal(file).open(data) == CONTENT


@pytest.mark.parametrize("content", ["", "# none\n", "short", "é" * 64, A.hex()[:-2], "x" * 70_000, "a b c d " * 10])
def test_files_that_hold_no_keys(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(StartError) as caught:
        Seal(file)
    assert "openssl rand" in str(caught.value) or "no file of keys" in str(caught.value)
    assert not content or content.strip() not in str(caught.value)
    with pytest.raises(StartError, match="cannot read"):
        Seal(file.with_name("missing"))
