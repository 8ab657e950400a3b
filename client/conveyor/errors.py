"""Every error that the SDK raises: one class per family, chosen by the server's reason and never by its message.

Invariant: `from_fault` knows every ErrorReason of the contract (a test enumerates them), so that a caller catches
classes and reads `.metadata`, and parses nothing.
"""

# ruff: noqa: N818 - a name says what happened: `except SessionExpired` reads better than SessionExpiredError.

from collections.abc import Mapping
from typing import Any

import grpc
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import errors_pb2 as e
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"


class ConveyorError(Exception):
    """Something that was asked of Conveyor did not happen; the message says what to do.

    Attributes:
        reason: ErrorReason without its prefix, such as `SESSION_NOT_FOUND`; empty where the server gave none.
        code: the gRPC status code.
        metadata: the keys that errors.proto names for the reason; values are text.
        retry_s: seconds after which trying again is worth it, or None where waiting does not help.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        metadata: Mapping[str, str] | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_s = retry_s


class ConnectionLost(ConveyorError, ConnectionError):
    """The server could not be reached, or stayed away for longer than `resume_timeout_s`.

    Steps that were unanswered may or may not have been applied. Open the session again with `resume=True`: its
    `applied_seq` tells. Where that is lower than what this object answered, the server was lost before its store had
    the steps between (see `durable_seq`), and this object, which would have sent them again, has ended: send their
    inputs once more, as the session's next steps.
    """


class CallTimeout(ConveyorError, TimeoutError):
    """No answer within the time that was given, though the connection stands. What was asked may still happen."""


class ClientClosed(ConveyorError):
    """The client, session or population was closed before this call, or by another thread or task during it."""


class ProtocolError(ConveyorError):
    """Client and server do not understand each other: they are of versions that do not fit, or one has a bug."""


class SessionNotFound(ConveyorError, LookupError):
    """The server does not have the session. It is never restarted from its initial state without being asked."""


class SessionExpired(SessionNotFound):
    """The session was idle for longer than its limit, and is gone."""


class SessionClosed(SessionNotFound):
    """The session was closed, by its client, by another, or with its model."""


class SessionExists(ConveyorError):
    """A session of that id lives already: choose another id, or open it with `resume=True`."""


class SessionTakenOver(ConveyorError):
    """Another client resumed the session. It lives there; this object can do nothing more with it."""


class InvalidSessionId(ConveyorError, ValueError):
    """A session id is 1 to 128 of letters, digits and `._:-`."""


class StepFailed(ConveyorError):
    """A step was not applied: the session's state did not move, and the same input can be sent again."""


class StepGap(StepFailed):
    """The server lacks earlier steps of this session; `metadata["next_seq"]` is the one that it waits for."""


class StepConflict(ConveyorError):
    """This step number was already used with other content: two clients step one session."""


class StepAnswerEvicted(ConveyorError):
    """The step was applied, but its answer is no longer kept. Never send its input again."""


class StepAborted(StepFailed):
    """An earlier step of the session failed, so this one was not applied either."""


class StepTimeout(StepFailed, TimeoutError):
    """The step waited for longer than its timeout and was not applied."""


class StepCancelled(StepFailed):
    """The step was given up before it ran, and was not applied."""


class CreditExceeded(StepFailed):
    """More steps were unanswered than `max_in_flight` allows; another client shares the session."""


class InvalidInput(StepFailed, ValueError):
    """The input is not what the model takes; the message says what it takes and what came. Nothing moved."""


class StateNonFinite(StepFailed):
    """The step would have made the session's state NaN or infinite. Nothing moved."""


class ModelNotFound(ConveyorError, LookupError):
    """The server has no such model or version; `metadata["available"]` lists what there is."""


class ModelNotReady(ConveyorError):
    """The model is being loaded or unloaded: try again after `retry_s`."""


class ModelFailed(StepFailed):
    """The model's run failed on the server. Nothing moved."""


class ModelMismatch(ConveyorError):
    """The snapshot is of another model: digests differ."""


class ModelInvalid(ConveyorError):
    """The model's file cannot be served."""


class ModelInUse(ConveyorError):
    """Sessions live on the model; unloading it needs `force=True`, which closes them."""


class SnapshotInvalid(ConveyorError, ValueError):
    """The snapshot is cut, altered or of an unknown format."""


class Overloaded(StepFailed):
    """The server refused work before it became latency: try again after `retry_s`."""


class SessionsExhausted(Overloaded):
    """The server holds as many sessions as it may."""


class Draining(ConveyorError):
    """The server is going away and no other one answered in time."""


class StoreUnavailable(ConveyorError):
    """The server's store of sessions does not answer. Nothing is lost, and nothing moved: try again after `retry_s`."""


class RecordInvalid(ConveyorError):
    """What the server's store holds of the session is torn, or not what was written. Restore a snapshot."""


class NotDurable(ConveyorError):
    """More durability was asked for than there is: the server keeps no sessions so, or this session is not kept."""


class Unauthenticated(ConveyorError):
    """The server does not know who calls: give `connect` a `token`, or a client certificate, that it accepts."""


class PermissionDenied(ConveyorError):
    """Whoever calls may not do that here; `metadata["roles"]` lists the roles that may."""


class RowsFailed(ConveyorError):
    """Some rows of a population's step failed; the others were applied, and their results are here.

    Attributes:
        errors: row of the population -> its error.
        rows: `[k]` int64, the rows of the population that the step was for, in the order of `outputs`.
        outputs: what `step` would have returned; entries of failed rows are zeros (or empty, where ragged).
        succeeded: `[k]` bool, which entries of `outputs` are real.
        later: outcomes (outputs or RowsFailed) of the steps that `stream` had sent after this one.
    """

    def __init__(self, errors: Mapping[int, ConveyorError], rows: Any, outputs: Any, succeeded: Any) -> None:
        row, first = next(iter(errors.items()))
        message = f"{len(errors)} of {len(rows)} rows failed; row {row}: {first}"
        super().__init__(message, reason=first.reason, code=first.code, metadata=first.metadata, retry_s=first.retry_s)
        self.errors = dict(errors)
        self.rows = rows
        self.outputs = outputs
        self.succeeded = succeeded
        self.later: list[Any] = []


_CLASSES: dict[e.ErrorReason.ValueType, type[ConveyorError]] = {
    e.ERROR_REASON_SESSION_NOT_FOUND: SessionNotFound,
    e.ERROR_REASON_SESSION_EXPIRED: SessionExpired,
    e.ERROR_REASON_SESSION_CLOSED: SessionClosed,
    e.ERROR_REASON_SESSION_EXISTS: SessionExists,
    e.ERROR_REASON_SESSION_TAKEN_OVER: SessionTakenOver,
    e.ERROR_REASON_SESSION_ID_INVALID: InvalidSessionId,
    e.ERROR_REASON_STEP_GAP: StepGap,
    e.ERROR_REASON_STEP_CONFLICT: StepConflict,
    e.ERROR_REASON_STEP_ANSWER_EVICTED: StepAnswerEvicted,
    e.ERROR_REASON_STEP_ABORTED: StepAborted,
    e.ERROR_REASON_STEP_TIMEOUT: StepTimeout,
    e.ERROR_REASON_CREDIT_EXCEEDED: CreditExceeded,
    e.ERROR_REASON_STEP_CANCELLED: StepCancelled,
    e.ERROR_REASON_INPUT_UNKNOWN: InvalidInput,
    e.ERROR_REASON_INPUT_MISSING: InvalidInput,
    e.ERROR_REASON_INPUT_DTYPE: InvalidInput,
    e.ERROR_REASON_INPUT_SHAPE: InvalidInput,
    e.ERROR_REASON_INPUT_SIZE: InvalidInput,
    e.ERROR_REASON_INPUT_NON_FINITE: InvalidInput,
    e.ERROR_REASON_INPUT_EMPTY: InvalidInput,
    e.ERROR_REASON_INPUT_TOO_LONG: InvalidInput,
    e.ERROR_REASON_INPUT_REPEATED: InvalidInput,
    e.ERROR_REASON_FRAME_INVALID: ProtocolError,
    e.ERROR_REASON_HANDLE_UNKNOWN: ProtocolError,
    e.ERROR_REASON_HANDLE_IN_USE: ProtocolError,
    e.ERROR_REASON_MESSAGE_INVALID: ProtocolError,
    e.ERROR_REASON_MODEL_NOT_FOUND: ModelNotFound,
    e.ERROR_REASON_MODEL_NOT_READY: ModelNotReady,
    e.ERROR_REASON_MODEL_FAILED: ModelFailed,
    e.ERROR_REASON_MODEL_MISMATCH: ModelMismatch,
    e.ERROR_REASON_STATE_NON_FINITE: StateNonFinite,
    e.ERROR_REASON_MODEL_INVALID: ModelInvalid,
    e.ERROR_REASON_MODEL_IN_USE: ModelInUse,
    e.ERROR_REASON_SNAPSHOT_INVALID: SnapshotInvalid,
    e.ERROR_REASON_SESSIONS_EXHAUSTED: SessionsExhausted,
    e.ERROR_REASON_OVERLOADED: Overloaded,
    e.ERROR_REASON_DRAINING: Draining,
    e.ERROR_REASON_STORE_UNAVAILABLE: StoreUnavailable,
    e.ERROR_REASON_RECORD_INVALID: RecordInvalid,
    e.ERROR_REASON_NOT_DURABLE: NotDurable,
    e.ERROR_REASON_SEQUENCE_INVALID: ProtocolError,
    e.ERROR_REASON_OUTPUT_UNKNOWN: ProtocolError,
    e.ERROR_REASON_NOT_OFFERED: ProtocolError,
    e.ERROR_REASON_CALLER_UNKNOWN: Unauthenticated,
    e.ERROR_REASON_ROLE_MISSING: PermissionDenied,
}
# What a status says that carries no reason: it comes from gRPC itself or from a proxy.
_BARE: dict[grpc.StatusCode, type[ConveyorError]] = {
    grpc.StatusCode.UNAVAILABLE: ConnectionLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: CallTimeout,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def from_fault(fault: Fault, code: grpc.StatusCode | None = None) -> ConveyorError:
    """The error of a fault. `code` is the status code where the fault itself has no reason."""
    if fault.reason == e.ERROR_REASON_UNSPECIFIED:
        code = code or grpc.StatusCode.UNKNOWN
        kind, reason = _BARE.get(code, ConveyorError), fault.metadata.get("reason", "")
    else:
        code = _CODES[fault.code]
        kind, reason = _CLASSES.get(fault.reason, ConveyorError), fault.reason_name
    return kind(fault.message, reason=reason, code=code, metadata=fault.metadata, retry_s=fault.retry_s)


def from_rpc_status(status: status_pb2.Status) -> ConveyorError:
    """The error of a google.rpc.Status that travelled in a message."""
    return from_fault(from_status(status), _CODES.get(status.code))


def from_rpc_error(code: grpc.StatusCode, details: str, trailing_metadata: Any, what: str) -> ConveyorError:
    """The error of a failed call. `what` names the call for a reader of a bare status: `ListModels on host:port`."""
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY:
            try:
                return from_rpc_status(status_pb2.Status.FromString(value))
            except DecodeError:
                # Some proxies put details of their own there; the bare status still says what is known.
                break
    return from_fault(Fault(e.ERROR_REASON_UNSPECIFIED, f"{what}: {details or code.name}"), code)
