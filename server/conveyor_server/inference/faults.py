"""Refusals in the words that users of this protocol search for.

Invariant: a status keeps the reason of its fault, so that both kinds of client can tell why.
"""

from conveyor_proto import reasons
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from google.rpc import code_pb2, status_pb2

# What these clients take for a server or a sequence that is not there now, and try again.
_CODES: dict[e.ErrorReason.ValueType, int] = {e.ERROR_REASON_STEP_TIMEOUT: code_pb2.UNAVAILABLE}
_SAY: dict[e.ErrorReason.ValueType, str] = {
    e.ERROR_REASON_MODEL_NOT_FOUND: "Request for unknown model: '{model}' is not found: ",
    e.ERROR_REASON_MODEL_NOT_READY: "Request for unknown model: '{model}' is not ready: ",
    e.ERROR_REASON_STEP_TIMEOUT: "timeout of the corresponding sequence has been expired: ",
    e.ERROR_REASON_DRAINING: "Server is stopping, scheduler for model has stopped accepting new inference requests: ",
    e.ERROR_REASON_OVERLOADED: "Exceeds maximum queue size: ",
    e.ERROR_REASON_CREDIT_EXCEEDED: "Exceeds maximum queue size: ",
    e.ERROR_REASON_SESSIONS_EXHAUSTED: "no free sequence slot is available: ",
}
# Steps have numbers that these clients do not know.
_INSTEAD: dict[e.ErrorReason.ValueType, str] = {
    e.ERROR_REASON_STEP_ABORTED: "the request was not applied because one before it failed: send both again"
}


def to_status(fault: Fault) -> status_pb2.Status:
    """The status of a fault, for this protocol's clients."""
    status = reasons.to_status(fault)
    status.code = _CODES.get(fault.reason, status.code)
    status.message = _INSTEAD.get(fault.reason, status.message)
    status.message = _SAY.get(fault.reason, "").format(model=fault.metadata.get("model", "")) + status.message
    return status
