"""AttachSession: which session a stream means, created or found."""

from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import refuse
from conveyor_server.servicers.convert import idle_timeout_s, missing
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.session import Session

_Mode = session_pb2.AttachSession


def open_session(message: session_pb2.AttachSession, core: Core) -> tuple[Session, bool]:
    """The session that the message asks for, and whether it was there before.

    Raises:
        Refused: MESSAGE_INVALID, MODEL_MISMATCH, or as Directory.create and Directory.lookup.
    """
    if message.mode == _Mode.MODE_CREATE:
        return _create(message, core), False
    if message.mode == _Mode.MODE_RESUME:
        return _resume(message, core), True
    if message.mode == _Mode.MODE_RESUME_OR_CREATE:
        if message.session_id in core.directory.sessions:
            return _resume(message, core), True
        return _create(message, core), False
    raise missing("attach.mode", "must say whether to create or to resume")


def _create(message: session_pb2.AttachSession, core: Core) -> Session:
    if not message.model:
        raise missing("attach.model", "is needed to create a session")
    return core.directory.create(
        core.repository.find(message.model, message.version).serving,
        core.now(),
        session_id=message.session_id,
        max_in_flight=message.options.max_in_flight,
        idle_timeout_s=idle_timeout_s(message.options),
    )


def _resume(message: session_pb2.AttachSession, core: Core) -> Session:
    if not message.session_id:
        raise missing("attach.session_id", "is needed to resume a session")
    session = core.directory.lookup(message.session_id)
    engine = session.engine
    if message.model not in {"", engine.model} or message.version not in {"", engine.version}:
        asked = " version ".join(filter(None, (message.model, message.version)))
        raise refuse(
            e.ERROR_REASON_MODEL_MISMATCH,
            f"session {session.id!r} is of model {engine.model} version {engine.version}, not of {asked}: resume it "
            "without a model, or create another session",
            session_id=session.id,
            model=engine.model,
            version=engine.version,
            digest=engine.spec.digest,
        )
    return session
