"""Records of the store as sessions, and the other way round for sessions that begin with a state.

Invariant: a record becomes a session only of the model that it was made of (the digest says which), or of one that the
policy lets it move to; whatever cannot be read is refused with the session's name and why.
"""

import logging
from collections.abc import Callable

import numpy as np
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import store_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import public_name
from conveyor_server.keeper import body, head
from conveyor_server.repository import Repository
from conveyor_server.sessions.keeping import Kept
from conveyor_server.store.contract import Record

_log = logging.getLogger("conveyor")


class Revival:
    """Makes sessions of records. Core thread only.

    Args:
        repository: the models.
        runtime: of this server.
        wall: unix seconds of a moment of the driver's clock.
    """

    def __init__(self, repository: Repository[Engine], runtime: str, wall: Callable[[float], float]) -> None:
        self._repository = repository
        self._runtime = runtime
        self._wall = wall
        self._strangers: set[str] = set()
        self._moves: dict[tuple[str, str], str] = {}

    def move(self, model: str, source: str, target: str) -> None:
        """Sessions of a version that come in from now on go on with another one."""
        self._moves[model, source] = target
        for key, version in self._moves.items():
            if key[0] == model and version == source:
                self._moves[key] = target

    def stay(self, model: str, version: str) -> None:
        """A version is another model now, that sessions of others cannot go on with: none moves to it any more."""
        for key in [key for key, target in self._moves.items() if key[0] == model and target == version]:
            del self._moves[key]

    def of(self, record: Record, now: float) -> Kept:
        """The session of a record; it has moved where `kept.engine` is of another version than the record says.

        Raises:
            Refused: RECORD_INVALID, or why its model is not served here.
        """
        content = self.head(record)
        engine = self._engine(content)
        try:
            read = body.decode(record.body, body.seed(record.session_id, content.model_digest), engine.spec)
        except body.BodyInvalid as why:
            raise _invalid(record.session_id, "state", str(why)) from None
        if read.seq != record.seq:
            raise _invalid(record.session_id, "state", f"is of step {read.seq}, and the record says {record.seq}")
        self._compare(record.runtime)
        created_at = content.created_at.ToNanoseconds() / 1e9
        return Kept(
            record.session_id,
            engine,
            head.options_of(content),
            record.epoch,
            read.states,
            read.seq,
            read.time_steps,
            read.seq,
            now - (self._wall(now) - created_at),
            read.answers,
        )

    @staticmethod
    def head(record: Record) -> store_pb2.StoredSession:
        """What a record says of its session.

        Raises:
            Refused: RECORD_INVALID.
        """
        try:
            return head.decode(record.session_id, record.head)
        except head.HeadInvalid as why:
            raise _invalid(record.session_id, "head", str(why)) from None

    @staticmethod
    def first_body(kept: Kept, wall: float) -> bytes:
        """The body of a session as it begins."""
        piece = body.Piece(
            [body.seed(kept.session_id, kept.engine.spec.digest)],
            np.array([kept.applied_seq]),
            np.array([kept.applied_time_steps]),
            np.array([wall]),
            [] if kept.states is None else [state[np.newaxis] for state in kept.states],
            [],
        )
        return body.encode(piece)[0]

    def _engine(self, content: store_pb2.StoredSession) -> Engine:
        """The session's own version, or the one that it is to move to.

        Where its own is not here, another of that model with the same digest is the same model.
        """
        version = self._moves.get((content.model, content.version))
        target = None if version is None else self._repository.ready(content.model, version)
        if target is not None:
            return target.serving
        try:
            # Of other models its tenant may know nothing.
            item = self._repository.find(content.model, content.version, content.model.__eq__)
        except Refused:
            same = self._repository.with_digest(content.model, "", content.model_digest)
            if same is None:
                raise
            return same.serving
        engine = item.serving
        if engine.spec.digest != content.model_digest:
            former = self._repository.with_digest(content.model, content.version, content.model_digest)
            if former is not None:
                # Its file was replaced, and sessions that were there before stay on the former one.
                return former.serving
            raise refuse(
                e.ERROR_REASON_MODEL_MISMATCH,
                f"session {public_name(content.session_id)!r} is of another model than {content.model} version "
                f"{content.version} is here: serve the version that it was made with",
                model=content.model,
                version=content.version,
                digest=engine.spec.digest,
                snapshot_digest=content.model_digest,
            )
        return engine

    def _compare(self, runtime: str) -> None:
        """Says once where a state comes from that was computed otherwise."""
        if runtime != self._runtime and runtime not in self._strangers:
            self._strangers.add(runtime)
            _log.warning(
                "a session comes from a server that computes with %s, and this one with %s: it goes on from the same "
                "state, and later answers may differ in their last bits",
                runtime,
                self._runtime,
            )


def _invalid(session_id: str, part: str, why: str) -> Refused:
    return Refused(
        Fault(
            e.ERROR_REASON_RECORD_INVALID,
            f"the {part} in the store's record of session {public_name(session_id)!r} {why}: the session cannot go on; "
            "find out who writes to the store, close it, and restore a snapshot or send its history again",
            {"session_id": public_name(session_id)},
        )
    )
