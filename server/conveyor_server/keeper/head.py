"""What a session was granted and what it is of, as the bytes of its record.

Invariant: what `decode` accepts is what `encode` wrote, for the session that is asked for. Layout: MAGIC, CRC-32 of the
rest (little-endian), a serialized StoredSession.
"""

import zlib

from conveyor_proto.v1 import store_pb2
from google.protobuf.message import DecodeError

from conveyor_server.engine.engine import Engine
from conveyor_server.sessions.session import SessionOptions

MAGIC = b"CVH1"
FORMAT = 1
_HEAD = len(MAGIC) + 4


class HeadInvalid(Exception):  # noqa: N818 - it says what happened
    """The bytes are no head of that session; the message says why."""


def encode(session_id: str, engine: Engine, options: SessionOptions, created_at: float) -> bytes:
    """The head of a session of an engine's model.

    Args:
        session_id: its name.
        engine: of its model version.
        options: what it was granted.
        created_at: unix seconds.
    """
    content = store_pb2.StoredSession(
        format=FORMAT,
        session_id=session_id,
        model=engine.model,
        version=engine.version,
        model_digest=engine.spec.digest,
        max_in_flight=options.max_in_flight,
        durability=options.durability,
        tenant=options.tenant,
    )
    content.created_at.FromNanoseconds(round(created_at * 1e9))
    content.idle_timeout.FromNanoseconds(round(options.idle_timeout_s * 1e9))
    return sealed(content)


def sealed(content: store_pb2.StoredSession) -> bytes:
    """The bytes of a content."""
    data = content.SerializeToString(deterministic=True)
    return MAGIC + zlib.crc32(data).to_bytes(4, "little") + data


def decode(session_id: str, head: bytes) -> store_pb2.StoredSession:
    """The content of a head.

    Raises:
        HeadInvalid: it is torn, altered, another session's, or of a later version of this server.
    """
    data = head[_HEAD:]
    if len(head) < _HEAD or head[: len(MAGIC)] != MAGIC:
        raise HeadInvalid("is not one, or is cut short")
    if zlib.crc32(data).to_bytes(4, "little") != head[len(MAGIC) : _HEAD]:
        raise HeadInvalid("was torn or altered: its checksum does not fit")
    try:
        content = store_pb2.StoredSession.FromString(data)
    except DecodeError:
        raise HeadInvalid("cannot be read") from None
    if content.format != FORMAT:
        raise HeadInvalid(f"has format {content.format}, and this server reads {FORMAT}")
    if content.session_id != session_id:
        raise HeadInvalid(f"is of session {content.session_id!r}")
    return content


def options_of(content: store_pb2.StoredSession) -> SessionOptions:
    """What the session was granted."""
    return SessionOptions(
        content.max_in_flight, content.idle_timeout.ToNanoseconds() / 1e9, content.durability, content.tenant
    )
