"""Errors on the wire: every ErrorReason, its canonical code, and google.rpc.Status in both directions.

Invariant: a status made here carries one google.rpc.ErrorInfo of domain `conveyor`, so that no one parses messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from conveyor_proto.v1 import errors_pb2 as e

DOMAIN = "conveyor"
_PREFIX = "ERROR_REASON_"
_NAMES = frozenset(e.ErrorReason.keys())

_REASONS_BY_CODE: dict[int, tuple[e.ErrorReason.ValueType, ...]] = {
    code_pb2.NOT_FOUND: (
        e.ERROR_REASON_SESSION_NOT_FOUND,
        e.ERROR_REASON_SESSION_EXPIRED,
        e.ERROR_REASON_SESSION_CLOSED,
        e.ERROR_REASON_MODEL_NOT_FOUND,
    ),
    code_pb2.ALREADY_EXISTS: (e.ERROR_REASON_SESSION_EXISTS, e.ERROR_REASON_STEP_ANSWER_EVICTED),
    code_pb2.ABORTED: (e.ERROR_REASON_SESSION_TAKEN_OVER, e.ERROR_REASON_STEP_ABORTED),
    code_pb2.OUT_OF_RANGE: (e.ERROR_REASON_STEP_GAP,),
    code_pb2.DEADLINE_EXCEEDED: (e.ERROR_REASON_STEP_TIMEOUT,),
    code_pb2.CANCELLED: (e.ERROR_REASON_STEP_CANCELLED,),
    code_pb2.INVALID_ARGUMENT: (
        e.ERROR_REASON_SESSION_ID_INVALID,
        e.ERROR_REASON_STEP_CONFLICT,
        e.ERROR_REASON_INPUT_UNKNOWN,
        e.ERROR_REASON_INPUT_MISSING,
        e.ERROR_REASON_INPUT_DTYPE,
        e.ERROR_REASON_INPUT_SHAPE,
        e.ERROR_REASON_INPUT_SIZE,
        e.ERROR_REASON_INPUT_NON_FINITE,
        e.ERROR_REASON_INPUT_EMPTY,
        e.ERROR_REASON_INPUT_TOO_LONG,
        e.ERROR_REASON_INPUT_REPEATED,
        e.ERROR_REASON_FRAME_INVALID,
        e.ERROR_REASON_HANDLE_UNKNOWN,
        e.ERROR_REASON_HANDLE_IN_USE,
        e.ERROR_REASON_MESSAGE_INVALID,
        e.ERROR_REASON_SNAPSHOT_INVALID,
        e.ERROR_REASON_SEQUENCE_INVALID,
        e.ERROR_REASON_OUTPUT_UNKNOWN,
    ),
    code_pb2.FAILED_PRECONDITION: (
        e.ERROR_REASON_MODEL_MISMATCH,
        e.ERROR_REASON_STATE_NON_FINITE,
        e.ERROR_REASON_MODEL_INVALID,
        e.ERROR_REASON_MODEL_IN_USE,
        e.ERROR_REASON_NOT_DURABLE,
    ),
    code_pb2.RESOURCE_EXHAUSTED: (
        e.ERROR_REASON_CREDIT_EXCEEDED,
        e.ERROR_REASON_SESSIONS_EXHAUSTED,
        e.ERROR_REASON_OVERLOADED,
    ),
    code_pb2.UNAVAILABLE: (
        e.ERROR_REASON_MODEL_NOT_READY,
        e.ERROR_REASON_DRAINING,
        e.ERROR_REASON_STORE_UNAVAILABLE,
    ),
    code_pb2.DATA_LOSS: (e.ERROR_REASON_RECORD_INVALID,),
    code_pb2.INTERNAL: (e.ERROR_REASON_MODEL_FAILED,),
    code_pb2.UNIMPLEMENTED: (e.ERROR_REASON_NOT_OFFERED,),
    code_pb2.UNAUTHENTICATED: (e.ERROR_REASON_CALLER_UNKNOWN,),
    code_pb2.PERMISSION_DENIED: (e.ERROR_REASON_ROLE_MISSING,),
}

# google.rpc.Code of each reason.
CODES: dict[e.ErrorReason.ValueType, int] = {
    reason: code for code, reasons in _REASONS_BY_CODE.items() for reason in reasons
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One refusal, independent of how it travels.

    Attributes:
        reason: why, as an ErrorReason.
        message: a sentence for a person that says what to do.
        metadata: the keys that errors.proto names for the reason; values are text.
        retry_s: seconds after which trying again is worth it, or None where waiting does not help.
    """

    reason: e.ErrorReason.ValueType
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_s: float | None = None

    @property
    def code(self) -> int:
        """The google.rpc.Code of the reason."""
        return CODES.get(self.reason, int(code_pb2.UNKNOWN))

    @property
    def reason_name(self) -> str:
        """ErrorInfo.reason: the enum value's name without its prefix."""
        return e.ErrorReason.Name(self.reason).removeprefix(_PREFIX)


def to_status(fault: Fault) -> status_pb2.Status:
    """The google.rpc.Status of a fault: ErrorInfo always, RetryInfo where `retry_s` is set."""
    status = status_pb2.Status(code=fault.code, message=fault.message)
    details = [error_details_pb2.ErrorInfo(reason=fault.reason_name, domain=DOMAIN, metadata=dict(fault.metadata))]
    if fault.retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(fault.retry_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> Fault:
    """The fault that a status carries; a status from elsewhere gives ERROR_REASON_UNSPECIFIED and its own message.

    A reason that this version does not know keeps its name in metadata key `reason`.
    """
    reason = e.ERROR_REASON_UNSPECIFIED
    metadata: dict[str, str] = {}
    retry_s = None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            metadata = dict(info.metadata)
            if _PREFIX + info.reason in _NAMES:
                reason = e.ErrorReason.Value(_PREFIX + info.reason)
            else:
                metadata["reason"] = info.reason
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Fault(reason, status.message, metadata, retry_s)
