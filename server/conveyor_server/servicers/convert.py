"""Core records as messages, and message fields as core arguments."""

from collections.abc import Iterable

from conveyor_proto.codec import encode
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2, tensor_pb2
from google.protobuf.duration_pb2 import Duration

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import Caller
from conveyor_server.inputs import StepInputs
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Session, Submission


def session_info(session: Session, core: Core, caller: Caller) -> session_pb2.SessionInfo:
    """A session as a caller sees it."""
    engine = session.engine
    return session_pb2.SessionInfo(
        session_id=caller.shown(session.id),
        model=engine.model,
        version=engine.version,
        model_digest=engine.spec.digest,
        epoch=session.epoch,
        applied_seq=session.applied_seq,
        applied_time_steps=session.applied_time_steps,
        max_in_flight=session.options.max_in_flight,
        idle_timeout=duration(session.options.idle_timeout_s),
        created_at=core.timestamp(session.created_at),
        last_used_at=core.timestamp(session.last_used_at),
        attached=session.attachment is not None,
        oldest_replayable_seq=session.answers.oldest_seq,
        state_bytes=engine.spec.state_bytes,
        pending_steps=len(session.pending),
        durability=session.durability,
        durable_seq=session.durable_seq,
        resident=True,
    )


def sessions_on(engine: Engine | None, directory: Directory) -> int:
    """How many sessions an engine has."""
    return sum(session.engine is engine for session in directory.sessions.values())


def output_tensors(answer: Answer) -> Iterable[tensor_pb2.Tensor]:
    """An answer's outputs, named, in the order of ModelSpec.outputs."""
    specs = answer.session.engine.spec.outputs
    return [encode(array, item.name) for array, item in zip(answer.outputs, specs, strict=True)]


def submission(
    content: StepInputs | Fault,
    limits: SessionLimits,
    *,
    seq: int,
    reply_to: object,
    epoch: int,
    timeout_ms: int,
    acked_seq: int,
) -> Submission:
    """A step for the core. One whose content cannot be used is given to it too: its number is then taken account of."""
    step = Submission(
        seq, reply_to, epoch=epoch, timeout_s=timeout_ms / 1e3 or limits.step_timeout_s, acked_seq=acked_seq
    )
    if isinstance(content, Fault):
        step.fault = content
    else:
        step.inputs, step.length, step.fingerprint = content.inputs, content.length, content.fingerprint
    return step


def idle_timeout_s(options: session_pb2.SessionOptions) -> float:
    """The idle limit that was asked for, in seconds; 0: the server's.

    Raises:
        Refused: MESSAGE_INVALID, for a negative one.
    """
    seconds = options.idle_timeout.ToNanoseconds() / 1e9
    if seconds < 0:
        raise missing("options.idle_timeout", "is negative: leave it unset for the server's limit")
    return seconds


def missing(field: str, why: str) -> Refused:
    """The refusal (MESSAGE_INVALID) of a message for one of its fields, to be raised by the caller."""
    return refuse(e.ERROR_REASON_MESSAGE_INVALID, f"{field} {why}", field=field)


def duration(seconds: float) -> Duration:
    """A Duration of that many seconds."""
    value = Duration()
    value.FromNanoseconds(round(seconds * 1e9))
    return value
