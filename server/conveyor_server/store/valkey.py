"""A store in a Valkey or Redis server, which servers on several machines share.

Invariants: each call is one script, which the server runs whole and alone, in one round trip (a put of many bytes is
several); a connection is looked at before it is used, so that one that was cut meanwhile fails no call; a call is sent
twice only where no server took it the first time; what a server reads only when its caller has given up, because the
network or either of them stood still, is not done.

It is for one server, or one primary with replicas: not for a cluster, whose keys lie apart. What was told done is there
as far as the server keeps it: `appendonly yes` with `appendfsync always` to outlive its machine, `maxmemory-policy
noeviction` so that nothing is dropped; a replica that takes over while it is behind has lost the last writes.
"""

import json
import math
import struct
import time
from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from valkey import exceptions as valkey_errors
from valkey.connection import Connection, ConnectionPool, SSLConnection

from conveyor_server.identity.caller import bounds
from conveyor_server.store.contract import (
    Behind,
    Checkpoint,
    Claim,
    Claimed,
    Created,
    Creation,
    Exists,
    Fenced,
    Found,
    Missing,
    Outcome,
    Page,
    Quota,
    QuotaFull,
    Record,
    StoreInvalid,
    StoreUnavailable,
    milliseconds,
)

_SCRIPT = files(__package__).joinpath("valkey.lua").read_text()
_TLS = {"valkey": False, "redis": False, "valkeys": True, "rediss": True}
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
# Of bodies in one script: the server runs nothing else meanwhile, and others wait for it no longer than theirs allow.
_MOST_BYTES = 1 << 24
_OUTCOMES = {ord("0"): Outcome.DONE, ord("1"): Outcome.FENCED, ord("2"): Outcome.MISSING}
# What a server says that does not do it now, by the first word, and what to do about it.
_ADVICE = {
    "LOADING": "it reads its data, wait",
    "BUSY": "a script keeps it busy, wait or look for what runs there",
    "READONLY": "it is a replica: name the primary",
    "MASTERDOWN": "it is a replica without its primary: name the primary",
    "OOM": "its memory is full: raise maxmemory, or lower what is stored",
    "MISCONF": "it cannot write its data to the disk: see its log",
    "NOREPLICAS": "it has too few replicas: see its min-replicas-to-write",
    "WRONGPASS": "it wants another user or password than the URL has, valkey://user:password@host",
    "NOPERM": "the URL's user may not do that: it needs EVAL, EVALSHA and what valkey.lua calls",
    "CROSSSLOT": "it is a cluster: name a server that is none",
    "MOVED": "it is a cluster: name a server that is none",
    "CLUSTERDOWN": "it is a cluster: name a server that is none",
}


_WORDS: dict[type[Exception], str] = {
    valkey_errors.BusyLoadingError: "LOADING",
    valkey_errors.ReadOnlyError: "READONLY",
    valkey_errors.OutOfMemoryError: "OOM",
    valkey_errors.AuthenticationError: "WRONGPASS",
    valkey_errors.NoPermissionError: "NOPERM",
}


class ValkeyStore:
    """See contract.StateStore. It connects when it is first asked.

    Args:
        url: `valkey://host:port/db` or `redis://`, `valkeys://` and `rediss://` with TLS; `user:password@` before the
            host; with TLS `?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`.
        timeout_s: how long the server may be silent, when it is connected to and when it answers.
        prefix: what the names of all keys begin with.

    Raises:
        StoreInvalid: the URL is none of these.
    """

    shared = True

    def __init__(self, url: str, *, timeout_s: float = 1.0, prefix: str = "conveyor") -> None:
        self.name, kind, options = _parse(url)
        self._prefix = prefix
        self._timeout_s = timeout_s
        # Of the server's clock, in milliseconds, over time.monotonic; None: it has to be asked.
        self._offset_ms: float | None = None
        self._sha = sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()
        self._pool = ConnectionPool(
            connection_class=kind,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_keepalive=True,
            lib_name=None,
            lib_version=None,
            **options,
        )

    def create(self, creations: Sequence[Creation]) -> list[Created]:
        """See StateStore."""
        rows, blobs = [], []
        bounds = [[quota for quota in new.quotas if quota.most] for new in creations]
        for new, quotas in zip(creations, bounds, strict=True):
            sizes = (len(new.head), len(new.body))
            expires = milliseconds(new.expires_at)
            rows.append(
                (new.session_id, new.seq, expires, new.owner, new.runtime, *sizes, new.counted_as(), quotas, new.epoch)
            )
            blobs += [new.head, new.body]
        answers = self._call("create", json.dumps(rows), b"".join(blobs))
        return [_created(answer, quotas) for answer, quotas in zip(answers, bounds, strict=True)]

    def take(self, claims: Sequence[Claim]) -> list[Claimed]:
        """See StateStore."""
        rows = [
            (
                claim.session_id,
                claim.owner,
                milliseconds(claim.expires_at),
                claim.max_epoch,
                claim.known_epoch,
                claim.min_seq,
            )
            for claim in claims
        ]
        answers = self._call(
            "take", json.dumps(rows), not_after=min((claim.not_after for claim in claims), default=math.inf)
        )
        claimed: list[Claimed] = []
        for claim, answer in zip(claims, answers, strict=True):
            claimed.append(Behind(answer[1]) if answer[0] == 3 else _found(claim.session_id, answer))
        return claimed

    def load(self, wanted: Sequence[tuple[str, int]]) -> list[Found]:
        """See StateStore."""
        answers = self._call("load", json.dumps(list(wanted)))
        return [_found(session_id, answer) for (session_id, _), answer in zip(wanted, answers, strict=True)]

    def put(self, checkpoint: Checkpoint) -> list[Outcome]:
        """See StateStore."""
        return [outcome for part in checkpoint.parts(_MOST_BYTES) for outcome in self._put(part)]

    def delete(self, sessions: Sequence[tuple[str, int]]) -> list[Outcome]:
        """See StateStore."""
        return _outcomes(self._call("delete", json.dumps(list(sessions))))

    def listed(self, after: str, limit: int, model: str, tenant: str = "") -> Page:
        """See StateStore."""
        first, behind = bounds(tenant)
        key = f"model:{model}" if model else ""
        total, more, rows = self._call("listed", max(after, first), limit, key, first, behind)
        return Page([_record(row[0].decode(), row) for row in rows], more=bool(more), total=total)

    def count(self) -> int:
        """See StateStore."""
        return int(self._call("count"))

    def sweep(self, now: float) -> int:
        """See StateStore."""
        return int(self._call("sweep", milliseconds(now)))

    def close(self) -> None:
        """See StateStore."""
        self._pool.disconnect()

    # ------------------------------------------------------------ within

    def _put(self, checkpoint: Checkpoint) -> list[Outcome]:
        count = len(checkpoint.session_ids)
        columns = (checkpoint.epochs, checkpoint.seqs, map(milliseconds, checkpoint.expires), checkpoint.sizes)
        numbers = b"".join(struct.pack(f"<{count}d", *column) for column in columns)
        heads = [part for index, head in checkpoint.heads.items() for part in (index + 1, head)]
        ids = "\n".join(checkpoint.session_ids)
        return _outcomes(
            self._call("put", ids, numbers, checkpoint.bodies, checkpoint.owner, checkpoint.runtime, *heads)
        )

    def _call(self, name: str, *arguments: str | bytes | int, not_after: float = math.inf) -> Any:
        """Runs the script, which does nothing after `not_after` (of time.monotonic), or after the timeout.

        Raises:
            StoreUnavailable: it was not run, or nobody knows whether it was; it will not be run later.
        """
        try:
            connection = self._connect()
            try:
                if self._offset_ms is None:
                    self._offset_ms = self._ask_time(connection)
                end = min(not_after, time.monotonic() + self._timeout_s)
                ends_at = max(0, round(end * 1e3 + self._offset_ms))
                return self._run(connection, (0, f"{name}@{ends_at}", self._prefix, *arguments))
            finally:
                self._pool.release(connection)
        except (valkey_errors.ValkeyError, OSError) as error:
            # It may be another server that answers next.
            self._offset_ms = None
            raise StoreUnavailable(self._why(error)) from error

    @staticmethod
    def _ask_time(connection: Any) -> float:
        """How far the server's clock is before ours, in milliseconds, by half of the time that it took to ask."""
        began = time.monotonic()
        connection.send_command("TIME")
        seconds, microseconds = map(int, connection.read_response())
        return seconds * 1e3 + microseconds / 1e3 - (began + time.monotonic()) * 500

    def _connect(self) -> Any:
        """A connection that nobody has closed; its methods have no types."""
        try:
            return self._pool.get_connection("EVALSHA")
        except valkey_errors.ConnectionError as error:
            if not isinstance(error.__context__, ConnectionRefusedError):
                raise
            # A server that starts again refuses for a moment.
            return self._pool.get_connection("EVALSHA")

    def _run(self, connection: Any, given: tuple[str | bytes | int, ...]) -> Any:
        connection.send_command("EVALSHA", self._sha, *given)
        try:
            return connection.read_response()
        except valkey_errors.NoScriptError:
            # It has not seen it yet, was started again, or was told to forget its scripts.
            connection.send_command("SCRIPT LOAD", _SCRIPT)
            connection.read_response()
        connection.send_command("EVALSHA", self._sha, *given)
        return connection.read_response()

    def _why(self, error: Exception) -> str:
        said = str(error)
        # The client takes the first word off where it has a class for it.
        word = _WORDS.get(type(error), said.partition(" ")[0])
        return f"{self.name}: {_ADVICE[word]} ({said})" if word in _ADVICE else f"{self.name}: {said}"


def _parse(url: str) -> tuple[str, type[Connection], dict[str, Any]]:
    """The name for people, and how to connect. What is said of a wrong URL has no part of it, for it has a password."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        db = int(parts.path.removeprefix("/") or 0)
    except ValueError:
        # Not even as its cause: it quotes what it could not read.
        raise StoreInvalid(
            "port and database are numbers, valkey://host:port/db, and other than letters and digits of a password are "
            "written as %XX"
        ) from None
    if parts.scheme not in _TLS or not parts.hostname or db < 0:
        raise StoreInvalid("its URL is valkey://host:port/db, or redis://, or with TLS valkeys:// or rediss://")
    tls = _TLS[parts.scheme]
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not set(options) <= (_TLS_OPTIONS if tls else set()):
        raise StoreInvalid("its URL has unknown options; with TLS there are " + ", ".join(sorted(_TLS_OPTIONS)))
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    given: dict[str, Any] = {"host": parts.hostname, "port": port, "db": db, **options}
    if parts.username:
        given["username"] = unquote(parts.username)
    if parts.password:
        given["password"] = unquote(parts.password)
    if tls:
        given["ssl_check_hostname"] = True
    return f"{parts.scheme}://{host}:{port}/{db}", SSLConnection if tls else Connection, given


def _created(answer: int, quotas: Sequence[Quota]) -> Created:
    if answer == 0:
        return None
    return Exists() if answer < 0 else QuotaFull(quotas[answer - 1])


def _found(session_id: str, answer: Sequence[Any]) -> Record | Missing | Fenced:
    if answer[0] == 1:
        return _record(session_id, answer)
    return Fenced(answer[1]) if answer[0] == 2 else Missing()


def _record(session_id: str, row: Sequence[Any]) -> Record:
    _, epoch, seq, expires, head, body, owner, runtime = row
    return Record(session_id, epoch, seq, head, body, owner.decode(), runtime.decode(), expires / 1000)


def _outcomes(digits: bytes) -> list[Outcome]:
    if digits.count(b"0") == len(digits):
        return [Outcome.DONE] * len(digits)
    return [_OUTCOMES[digit] for digit in digits]
