"""Why a session, or a step of it, is refused, and what to do about it. Sessions are called as their tenants do."""

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.identity.caller import public_name
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Session


def taken_over(session: Session) -> Fault:
    """Another stream holds the session."""
    return taken_over_at(session.id, session.epoch)


def taken_over_at(session_id: str, epoch: int) -> Fault:
    """Another stream holds the session, which is at that epoch, as far as is known."""
    return Fault(
        e.ERROR_REASON_SESSION_TAKEN_OVER,
        f"session {public_name(session_id)!r} was resumed elsewhere (epoch {epoch}); this holder is fenced",
        {"session_id": public_name(session_id), "epoch": str(epoch)},
    )


def full(limits: SessionLimits) -> Fault:
    """There is no room for one more session."""
    return Fault(
        e.ERROR_REASON_SESSIONS_EXHAUSTED,
        f"all {limits.max_sessions} sessions are taken: close some, wait until idle ones expire, or raise "
        "--max-sessions",
        {"max_sessions": str(limits.max_sessions)},
        limits.retry_s,
    )


def tenant_full(tenant: str, most: int, retry_s: float) -> Fault:
    """A tenant has as many sessions as it may."""
    return Fault(
        e.ERROR_REASON_SESSIONS_EXHAUSTED,
        f"all sessions of tenant {tenant!r} ({most}) are taken: close some, wait until unused ones expire, or raise "
        "the quota",
        {"max_sessions": str(most), "quota": f"tenant:{tenant}"},
        retry_s,
    )


def closing(session: Session, cause: str = "closing") -> Fault:
    """The session is closed, or about to be."""
    return Fault(
        e.ERROR_REASON_SESSION_CLOSED,
        f"session {session.name!r} is closed ({cause}) after step {session.applied_seq}; create another",
        {"session_id": session.name, "cause": cause},
    )


def expired(session: Session) -> Fault:
    """The idle limit passed."""
    limit_s = session.options.idle_timeout_s
    return Fault(
        e.ERROR_REASON_SESSION_EXPIRED,
        f"session {session.name!r} was idle for {limit_s:g} s and expired after step {session.applied_seq}: create "
        "another, and ask for a longer idle_timeout or take a snapshot before a pause",
        {"session_id": session.name, "idle_timeout_s": f"{limit_s:g}"},
    )


def exists(session_id: str) -> Fault:
    """The id is taken."""
    return Fault(
        e.ERROR_REASON_SESSION_EXISTS,
        f"session {public_name(session_id)!r} exists: resume it, or choose another id",
        {"session_id": public_name(session_id)},
    )


def lost(session: Session) -> Fault:
    """Its record is no longer in the store."""
    return Fault(
        e.ERROR_REASON_SESSION_CLOSED,
        f"session {session.name!r} is no longer in the store: it was closed elsewhere, or the store has lost it; "
        "create another",
        {"session_id": session.name, "cause": "closed"},
    )


def store_away(session_id: str, retry_s: float, why: str = "") -> Fault:
    """The store does not answer, and without it the session cannot go on as durably as it was asked to."""
    detail = f" ({why})" if why else ""
    return Fault(
        e.ERROR_REASON_STORE_UNAVAILABLE,
        f"the store does not answer{detail}, and session {public_name(session_id)!r} waits for it: nothing is lost, "
        "send again in a moment",
        {"session_id": public_name(session_id)},
        retry_s,
    )


def stopping(retry_s: float) -> Fault:
    """The server is about to stop."""
    message = "the server is draining and takes nothing new: connect to another one, or again later"
    return Fault(e.ERROR_REASON_DRAINING, message, retry_s=retry_s)


def aborted(session: Session, seq: int) -> Fault:
    """An earlier step failed."""
    return Fault(
        e.ERROR_REASON_STEP_ABORTED,
        f"step {seq} was not applied because step {session.failed_seq} failed: send again from {session.failed_seq}",
        {"session_id": session.name, "seq": str(seq), "next_seq": str(session.failed_seq)},
    )


def aborted_behind() -> Fault:
    """As `aborted`, of many sessions at once: each knows which step of its own was refused."""
    return Fault(
        e.ERROR_REASON_STEP_ABORTED,
        "the step was not applied because an earlier one of its session failed: send again from that one",
    )


def gap(session: Session, seq: int) -> Fault:
    """A step before it is missing."""
    next_seq = session.accepted_seq + 1
    return Fault(
        e.ERROR_REASON_STEP_GAP,
        f"step {seq} came and step {next_seq} is next: send the steps between first",
        {"next_seq": str(next_seq)},
    )


def conflict(session: Session, seq: int) -> Fault:
    """The seq stood for something else."""
    return Fault(
        e.ERROR_REASON_STEP_CONFLICT,
        f"step {seq} was already sent with other content: a seq names one content forever; the next is "
        f"{session.accepted_seq + 1}",
    )


def evicted(session: Session, seq: int) -> Fault:
    """The answer is no longer kept."""
    oldest = session.answers.oldest_seq
    kept = f"answers from {oldest} on are" if oldest else "no answer is"
    return Fault(
        e.ERROR_REASON_STEP_ANSWER_EVICTED,
        f"step {seq} was applied and its answer is no longer kept ({kept}); the next is {session.accepted_seq + 1}",
        {"oldest_seq": str(oldest)},
    )
