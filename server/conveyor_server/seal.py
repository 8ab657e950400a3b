"""The seal of a snapshot: a checksum, or where there are keys, a signature that nobody makes without one.

Invariant: with keys, what `open` accepts was closed with one of them (HMAC-SHA-256, RFC 2104; compared in constant
time). A key file that changes counts at once; one that cannot be used any more does not, and the log says why, once.
Layout: MAGIC, SHA-256 of the content, content; or SIGNED, the key's id, the HMAC of all that follows SIGNED but itself,
content.
"""

import base64
import binascii
import hashlib
import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.errors import Refused, StartError, refuse
from conveyor_server.stamp import Stamp, stamp

MAGIC, SIGNED = b"CVSN", b"CVSS"
_MAGIC, _ID, _DIGEST = 4, 8, hashlib.sha256().digest_size
# What HMAC-SHA-256 makes full use of.
_LEAST_KEY = 32
_MOST_FILE = 64 << 10
_log = logging.getLogger("conveyor")


class Seal:
    """Core thread only.

    Args:
        path: file of keys, see `read_keys`; None: there are none, and snapshots have a checksum alone.

    Raises:
        StartError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamp: Stamp = None
        self._keys: Mapping[bytes, bytes] = {}
        if path is not None:
            self._stamp = stamp(path)
            self._keys = read_keys(path)

    def close(self, content: bytes) -> bytes:
        """The content with its seal."""
        keys = self._latest()
        if not keys:
            return MAGIC + hashlib.sha256(content).digest() + content
        name, key = next(iter(keys.items()))
        return SIGNED + name + _signature(key, name, content) + content

    def open(self, data: bytes) -> bytes:
        """The content of what `close` gave.

        Raises:
            Refused: SNAPSHOT_INVALID.
        """
        keys = self._latest()
        magic = data[:_MAGIC]
        if magic == SIGNED:
            return _verified(data, keys)
        if magic != MAGIC or len(data) < _MAGIC + _DIGEST:
            raise invalid("is not one, or is cut short")
        if keys:
            raise invalid("is not signed, and this server takes only what it has signed")
        content = data[_MAGIC + _DIGEST :]
        if hashlib.sha256(content).digest() != data[_MAGIC : _MAGIC + _DIGEST]:
            raise invalid("was altered or cut short: its checksum does not fit")
        return content

    def _latest(self) -> Mapping[bytes, bytes]:
        if self._path is None or (found := stamp(self._path)) == self._stamp:
            return self._keys
        # Also where it is of no use: it is said once.
        self._stamp = found
        try:
            self._keys = read_keys(self._path)
        except StartError as error:
            _log.error("the snapshot keys as they were before go on: %s", error)
        else:
            _log.info("the snapshot keys were read again: %d", len(self._keys))
        return self._keys


def read_keys(path: Path) -> dict[bytes, bytes]:
    """The keys of a file, by their ids: one a line, in base64 or hexadecimal; lines that begin with # are comments.

    The first signs, and all are accepted: a new key is put before the old one.

    Raises:
        StartError: it cannot be read, or a line is no key of 32 bytes or more.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE + 1)
    except OSError as error:
        raise StartError(f"cannot read the snapshot keys {path}: {error.strerror}") from error
    if len(data) > _MOST_FILE:
        raise StartError(f"{path} has more than {_MOST_FILE} bytes: it is no file of keys")
    keys: dict[bytes, bytes] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        key = _key(text)
        if len(key) < _LEAST_KEY:
            # Never the line: it may be a key all the same.
            raise StartError(
                f"line {number} of {path} is no key: {_LEAST_KEY} or more random bytes in base64, as "
                "`openssl rand -base64 32` makes"
            )
        keys.setdefault(hashlib.sha256(key).digest()[:_ID], key)
    if not keys:
        raise StartError(f"{path} holds no key: put in a line that `openssl rand -base64 32` makes")
    return keys


def invalid(why: str) -> Refused:
    """The refusal (SNAPSHOT_INVALID) of a snapshot, to be raised by the caller."""
    return refuse(e.ERROR_REASON_SNAPSHOT_INVALID, f"the snapshot {why}: take another")


def _verified(data: bytes, keys: Mapping[bytes, bytes]) -> bytes:
    head = _MAGIC + _ID + _DIGEST
    if len(data) < head:
        raise invalid("is cut short")
    if not keys:
        raise invalid("is signed, and this server has no keys (--snapshot-keys) to tell by whom")
    name, signature, content = data[_MAGIC : _MAGIC + _ID], data[_MAGIC + _ID : head], data[head:]
    key = keys.get(name)
    if key is None:
        raise invalid("is signed with a key that this server does not have (any more)")
    if not hmac.compare_digest(_signature(key, name, content), signature):
        raise invalid("was altered or cut short: its signature does not fit")
    return content


def _signature(key: bytes, name: bytes, content: bytes) -> bytes:
    return hmac.digest(key, name + content, "sha256")


def _key(text: bytes) -> bytes:
    try:
        return binascii.unhexlify(text)
    except binascii.Error:
        pass
    try:
        return base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return b""
