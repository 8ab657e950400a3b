"""What a refusal means for the session whose step was refused."""

from enum import Enum, auto

import grpc

from conveyor.errors import ConveyorError


class Verdict(Enum):
    """What follows from one refused step."""

    # Nothing moved: the caller gets the error, and the next step takes the refused one's number.
    REFUSED = auto()
    # Nothing moved because an earlier step was refused.
    ABORTED = auto()
    # It was applied earlier, and only its answer is lost: the caller gets the error, the numbering goes on.
    APPLIED = auto()
    # This stream takes no more steps: keep it and send it again on the next one.
    RESEND = auto()
    # The server cannot do it now: keep it and send it again on this stream, after a while.
    LATER = auto()
    # It was answered once, the server that has the session now lacks it, and will not have it.
    LOST = auto()
    # The session is not there any more, or is not this client's alone to number.
    ENDED = auto()


_VERDICTS = {
    "STEP_ABORTED": Verdict.ABORTED,
    "STEP_ANSWER_EVICTED": Verdict.APPLIED,
    "DRAINING": Verdict.RESEND,
    "STORE_UNAVAILABLE": Verdict.LATER,
    "SESSION_NOT_FOUND": Verdict.ENDED,
    "SESSION_EXPIRED": Verdict.ENDED,
    "SESSION_CLOSED": Verdict.ENDED,
    "SESSION_TAKEN_OVER": Verdict.ENDED,
    "HANDLE_UNKNOWN": Verdict.ENDED,
    "RECORD_INVALID": Verdict.ENDED,
    # The server counts otherwise than this client: going on would skip or repeat a step.
    "STEP_GAP": Verdict.ENDED,
    "STEP_CONFLICT": Verdict.ENDED,
}

# What a server says of steps that were sent behind one that it did not take: it counts on from there, or has forgotten
# that it came.
FOLLOWS = frozenset({"STEP_ABORTED", "STEP_GAP"})
# What a server may say of a step now, and not say of it a moment later.
_PASSING = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
    }
)


def verdict(error: ConveyorError, *, held: bool, again: bool = False) -> Verdict:
    """What follows from a step that was refused with `error`.

    Args:
        error: the refusal.
        held: the server has said that this stream takes no more; it has let go of all handles then.
        again: the step was answered before, by a server that is gone. The application went on from there, and is never
            told that it was refused.
    """
    if held and error.reason == "HANDLE_UNKNOWN":
        return Verdict.RESEND
    kind = _VERDICTS.get(error.reason, Verdict.REFUSED)
    if again and kind in {Verdict.REFUSED, Verdict.ABORTED}:
        return Verdict.LATER if error.code in _PASSING else Verdict.LOST
    return kind
