"""AttachSession: which session a stream means, created or found, here or in the store."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import Caller
from conveyor_server.keeper.token import ResumeToken
from conveyor_server.servicers.convert import idle_timeout_s, missing
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.creation import Wanted, create
from conveyor_server.sessions.session import Session

_Mode = session_pb2.AttachSession


@dataclass(frozen=True, slots=True)
class Found:
    """The session that a stream means.

    Attributes:
        session: it lives here.
        resumed: it was there before.
        epoch: that the store has counted for this attach; 0: it is for the directory to count.
    """

    session: Session
    resumed: bool
    epoch: int = 0


Then: TypeAlias = Callable[[Found | Fault], None]


def open_session(message: session_pb2.AttachSession, core: Core, caller: Caller, then: Then) -> None:
    """Calls `then` with the session that the message asks for, at once or once the store has answered.

    A fault is MESSAGE_INVALID, MODEL_MISMATCH, or as of servicers.creation.create and Directory.lookup.
    """
    try:
        _open(message, core, caller, then)
    except Refused as refusal:
        then(refusal.fault)


def _open(message: session_pb2.AttachSession, core: Core, caller: Caller, then: Then) -> None:
    if message.mode == _Mode.MODE_CREATE:
        _create(message, core, caller, then)
        return
    if message.mode not in {_Mode.MODE_RESUME, _Mode.MODE_RESUME_OR_CREATE}:
        raise missing("attach.mode", "must say whether to create or to resume")
    creates = message.mode == _Mode.MODE_RESUME_OR_CREATE
    if not message.session_id:
        if creates:
            _create(message, core, caller, then)
            return
        raise missing("attach.session_id", "is needed to resume a session")
    directory = core.directory
    name = caller.full_name(message.session_id)
    here = directory.sessions.get(name)
    if core.store is None or (here is not None and not here.stored):
        if here is None and creates:
            _create(message, core, caller, then)
        else:
            then(Found(_checked(directory.lookup(name), message), resumed=True))
        return
    directory.admit(0)
    _check_known(message, here)
    token = ResumeToken.read(message.resume_token)

    def taken(opened: Session | Fault) -> None:
        if isinstance(opened, Fault):
            then(opened)
            return
        try:
            then(Found(_checked(opened, message), resumed=True, epoch=opened.epoch))
        except Refused as refusal:
            then(refusal.fault)

    def create_it() -> None:
        try:
            _create(message, core, caller, then)
        except Refused as refusal:
            then(refusal.fault)

    core.store.take(
        name,
        taken,
        max_epoch=message.max_epoch,
        min_seq=message.answered_seq if token is not None else 0,
        wait_s=token.left_s() if token is not None else 0.0,
        missing=create_it if creates else None,
    )


def _create(message: session_pb2.AttachSession, core: Core, caller: Caller, then: Then) -> None:
    if not message.model:
        raise missing("attach.model", "is needed to create a session")

    def created(opened: Session | Fault) -> None:
        then(opened if isinstance(opened, Fault) else Found(opened, resumed=False, epoch=opened.epoch))

    wanted = Wanted(
        core.repository.find(message.model, message.version, caller.uses).serving,
        session_id=message.session_id,
        max_in_flight=message.options.max_in_flight,
        idle_timeout_s=idle_timeout_s(message.options),
        durability=message.options.durability,
        tenant=caller.tenant,
        max_sessions=caller.max_sessions,
    )
    create(wanted, core, created)


def _check_known(message: session_pb2.AttachSession, here: Session | None) -> None:
    """Refuses before anybody is fenced, where that is known already."""
    if here is not None and here.closing is None:
        _checked(here, message)


def _checked(session: Session, message: session_pb2.AttachSession) -> Session:
    """The session, if it is of the model that the message names.

    Raises:
        Refused: MODEL_MISMATCH.
    """
    engine = session.engine
    if message.model not in {"", engine.model} or message.version not in {"", engine.version}:
        asked = " version ".join(filter(None, (message.model, message.version)))
        raise refuse(
            e.ERROR_REASON_MODEL_MISMATCH,
            f"session {session.name!r} is of model {engine.model} version {engine.version}, not of {asked}: resume it "
            "without a model, or create another session",
            session_id=session.name,
            model=engine.model,
            version=engine.version,
            digest=engine.spec.digest,
        )
    return session
