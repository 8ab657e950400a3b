"""Refusals: how the server says no.

Invariant: whatever a caller is told about a refusal is in its Fault; nothing else of the exception leaves the process.
"""

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e


class Refused(Exception):  # noqa: N818 - it says what happened
    """A request that the server will not carry out.

    Attributes:
        fault: the reason, message and metadata that go back to the caller.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def refuse(
    reason: e.ErrorReason.ValueType, message: str, *, retry_s: float | None = None, **metadata: object
) -> Refused:
    """The exception for a refusal, to be raised by the caller.

    Args:
        reason: why.
        message: a sentence for a person that says what to do.
        retry_s: seconds after which trying again is worth it, or None where waiting does not help.
        metadata: the keys that errors.proto names for the reason; values are turned to text.
    """
    return Refused(Fault(reason, message, {key: str(value) for key, value in metadata.items()}, retry_s))


class StartError(Exception):
    """The server cannot start. The message is for the person who started it and says what to do."""
