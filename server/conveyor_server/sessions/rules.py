"""The rules of a session's numbering: apply, replay, refuse, abort. See docs/protocol.md for them in words.

Invariant: every submission is answered exactly once for each `reply_to`, and a step that was refused, failed, aborted
or cancelled moved nothing. All functions are synchronous and belong to the core thread.
"""

import math
from collections.abc import Sequence

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.engine.engine import Engine
from conveyor_server.engine.step import Step
from conveyor_server.sessions import refusals
from conveyor_server.sessions.events import Answer
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.record import Recorded
from conveyor_server.sessions.session import Pending, Session, Submission

# Messages of one session that are accepted however much the model has to do, up to max_queue_s: one that runs, and one
# that is there when it is done.
PIPED = 2


def judge(session: Session, step: Submission, limits: SessionLimits, *, draining: bool) -> list[Answer] | None:
    """What to say at once, an empty list when the answer of a pending step will do, or None: accept the step."""
    if is_plain(session, step):
        # Attached, nothing waits, and what comes is next: all that can stand against it is the server.
        if step.acked_seq:
            session.answers.forget(step.acked_seq)
        fault = no_capacity(session.engine, limits, draining=draining)
        if fault is None:
            return None
        session.failed_seq = step.seq
        return _refuse(session, step, fault)
    if session.closing is not None:
        return _refuse(session, step, refusals.closing(session))
    if step.epoch and step.epoch != session.epoch:
        return _refuse(session, step, refusals.taken_over(session))
    # Only now: a fenced holder's word about answers that it has says nothing about the holder that came after it.
    if step.acked_seq:
        session.answers.forget(min(step.acked_seq, session.applied_seq))
    if step.seq <= session.accepted_seq:
        return _judge_known(session, step)
    fault = _judge_next(session, step, limits, draining)
    return None if fault is None else _refuse(session, step, fault)


def is_plain(session: Session, step: Submission) -> bool:
    """The step is the next of a session whose gate is open, by whoever holds it."""
    table, row = session.table, session.row
    return (
        bool(table.gate[row])
        and not table.ahead[row]
        and step.seq == table.applied_seq[row] + 1
        and step.fault is None
        and step.epoch == session.epoch
    )


def accept(session: Session, submission: Submission, now: float) -> Pending:
    """Queues a step that `judge` let pass, behind those that the session has accepted before."""
    step = Step(session.lane, submission.inputs, submission.length, session, now, now + submission.timeout_s)
    pending = Pending(submission.seq, submission.fingerprint, step, [submission.reply_to])
    waiting = session.own_pending
    waiting.append(pending)
    table, row = session.table, session.row
    table.failed_seq[row] = 0
    table.gate[row] = 0
    session.engine.backlog.add(step.length)
    if len(waiting) == 1 and not session.paused:
        session.engine.submit(step)
    return pending


def finish(session: Session, step: Step) -> list[Answer]:
    """Answers the session's running step, which the engine has finished, and makes the next one ready."""
    if step.train > 1:
        return _finish_train(session, step)
    if step.fault is not None:
        return fail(session, 0, step.fault)
    answers = _apply(session, step.outputs)
    if session.pending:
        session.engine.submit(session.pending[0].step)
    return answers


def fail(session: Session, index: int, fault: Fault) -> list[Answer]:
    """Fails the pending step at `index`, which the engine does not hold, and aborts those behind it."""
    failed = session.pending[index]
    session.failed_seq = failed.seq
    answers: list[Answer] = []
    kept = list(session.pending)[:index]
    for pending in list(session.pending)[index:]:
        session.engine.backlog.remove(pending.step.length)
        why = _about(fault, session, failed.seq) if pending is failed else refusals.aborted(session, pending.seq)
        answers += [Answer(waiter, session, pending.seq, fault=why) for waiter in pending.waiters]
    session.pending.clear()
    session.pending.extend(kept)
    return answers


def abort_waiting(session: Session, fault: Fault) -> list[Answer]:
    """Fails every pending step that is not running."""
    if not session.pending:
        return []
    stay = 0
    if not session.engine.cancel(session.pending[0].step):
        stay = max(1, sum(pending.step.running for pending in session.pending))
    if stay == len(session.pending):
        return []
    answers = fail(session, stay, fault)
    return [
        Answer(answer.reply_to, session, answer.seq, fault=_about(fault, session, answer.seq)) for answer in answers
    ]


def pause(session: Session) -> bool:
    """Takes the session's steps out of its engine until `go_on`; False: one of them runs, or has begun."""
    if session.pending:
        first = session.pending[0].step
        if any(pending.step.running for pending in session.pending) or first.begun:
            return False
        if not session.engine.cancel(first):
            return False
    session.table.paused.add(session.row)
    session.regate()
    return True


def go_on(session: Session) -> None:
    """Gives the session's steps to its engine, which may be another by now."""
    session.table.paused.discard(session.row)
    if session.pending:
        session.engine.submit(session.pending[0].step)
    session.regate()


def cancel(session: Session, seq: int, reply_to: object) -> list[Answer]:
    """Forgets a waiter; a step that nobody waits for any more and that is not running is taken back."""
    index = seq - session.applied_seq - 1
    if not 0 <= index < len(session.pending):
        return []
    pending = session.pending[index]
    if reply_to in pending.waiters:
        pending.waiters.remove(reply_to)
    if pending.waiters or not _take_back(session, index):
        return []
    message = f"step {seq} was cancelled before it ran; nothing moved"
    return fail(session, index, Fault(e.ERROR_REASON_STEP_CANCELLED, message))


def time_out(session: Session, now: float) -> list[Answer]:
    """Fails the first pending step whose deadline passed before it began, and aborts those behind it."""
    for index, pending in enumerate(session.pending):
        if pending.step.deadline <= now and _waits(pending.step) and _take_back(session, index):
            waited_s = now - pending.step.submitted_at
            message = f"step {pending.seq} waited {waited_s:.3f} s and did not begin; nothing moved, send it again"
            return fail(session, index, Fault(e.ERROR_REASON_STEP_TIMEOUT, message))
    return []


def first_deadline(session: Session) -> float:
    """When the first pending step is too late to begin; infinity where none waits."""
    return min((pending.step.deadline for pending in session.pending if _waits(pending.step)), default=math.inf)


def no_capacity(engine: Engine, limits: SessionLimits, *, draining: bool, piped: bool = False) -> Fault | None:
    """Why no step at all can be accepted now; or, if `piped`, no step of a session that has two messages unanswered.

    Whoever waits for answers sends no more than that, and its steps are refused only where the wait would be long. What
    comes faster than it is answered is refused before it makes all others wait.
    """
    if draining:
        return refusals.stopping(limits.retry_s)
    queue_s = engine.queue_s
    # A large model has much to do with few steps: two full runs are no queue.
    limit_s = max(limits.pipeline_queue_s, 2 * engine.full_run_s) if piped else limits.max_queue_s
    if queue_s <= limit_s:
        return None
    why = "and this session has two messages unanswered: slow down" if piped else "slow down, or spread the sessions"
    return Fault(
        e.ERROR_REASON_OVERLOADED,
        f"model {engine.model} has work for {queue_s:.3f} s in its queue, {why}",
        {"model": engine.model, "queue_s": f"{queue_s:.3f}"},
        retry_s=queue_s / 2,
    )


# ---------------------------------------------------------------- within


def _apply(session: Session, outputs: Sequence[Array]) -> list[Answer]:
    """The session's first pending step is done: it moves on, and every waiter is answered."""
    pending = session.pending.popleft()
    step = pending.step
    session.engine.backlog.remove(step.length)
    session.applied_seq = pending.seq
    session.applied_time_steps += step.length
    session.answers.add(Recorded(pending.seq, pending.fingerprint, step.length, outputs))
    return [
        Answer(waiter, session, pending.seq, outputs, step.length, replayed=index > 0)
        for index, waiter in enumerate(pending.waiters)
    ]


def _finish_train(session: Session, train: Step) -> list[Answer]:
    """Answers the steps of a train one by one; where it failed nothing moved, and they run again, each alone."""
    cars = list(session.pending)[: train.train]
    for car in cars:
        car.step.running = False
    if train.fault is None:
        answers: list[Answer] = []
        for turn in range(len(cars)):
            answers += _apply(session, [array[turn : turn + 1] for array in train.outputs])
    else:
        answers = []
    if session.pending:
        session.engine.submit(session.pending[0].step)
    return answers


def _judge_known(session: Session, step: Submission) -> list[Answer]:
    """A seq that was accepted before: answer it from the record, or with the pending one."""
    if step.seq < 1:
        message = "a session's steps are numbered from 1"
        return _refuse(session, step, Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "seq"}))
    if step.fault is not None:
        return _refuse(session, step, step.fault)
    recorded: Recorded | Pending | None
    if step.seq <= session.applied_seq:
        recorded = session.answers.get(step.seq)
    else:
        recorded = session.pending[step.seq - session.applied_seq - 1]
    if recorded is None:
        return _refuse(session, step, refusals.evicted(session, step.seq))
    if recorded.fingerprint != step.fingerprint:
        return _refuse(session, step, refusals.conflict(session, step.seq))
    if isinstance(recorded, Pending):
        recorded.waiters.append(step.reply_to)
        return []
    return [Answer(step.reply_to, session, step.seq, recorded.outputs, recorded.length, replayed=True)]


def _judge_next(session: Session, step: Submission, limits: SessionLimits, draining: bool) -> Fault | None:
    """Why a seq that was not accepted before cannot be accepted now."""
    if session.failed_seq and step.seq > session.failed_seq:
        return refusals.aborted(session, step.seq)
    if step.seq > session.accepted_seq + 1:
        return refusals.gap(session, step.seq)
    piped = len(session.pending) >= PIPED
    fault = (
        step.fault
        or _no_credit(session)
        or _suspended(session, limits)
        or no_capacity(session.engine, limits, draining=draining, piped=piped)
    )
    if fault is not None:
        session.failed_seq = step.seq
    return fault


def _no_credit(session: Session) -> Fault | None:
    """Why one more step of this session cannot be accepted now."""
    credit = int(session.table.credit[session.row])
    if len(session.pending) >= credit:
        return Fault(
            e.ERROR_REASON_CREDIT_EXCEEDED,
            f"{credit} steps of session {session.name!r} are unanswered, which is its credit: wait for an answer, or "
            "ask for a larger max_in_flight",
            {"max_in_flight": str(credit)},
        )
    return None


def _suspended(session: Session, limits: SessionLimits) -> Fault | None:
    """Why no step of a session this durable is accepted while the store is away."""
    if session.durability < session.table.suspended_from:
        return None
    return refusals.store_away(session.id, limits.retry_s)


def _waits(step: Step) -> bool:
    return not step.running and not step.begun


def _take_back(session: Session, index: int) -> bool:
    """Takes a pending step out of the engine, if it is there; False when it runs."""
    step = session.pending[index].step
    return not step.running and (index > 0 or session.engine.cancel(step))


def _refuse(session: Session, step: Submission, fault: Fault) -> list[Answer]:
    return [Answer(step.reply_to, session, step.seq, fault=_about(fault, session, step.seq))]


def _about(fault: Fault, session: Session, seq: int) -> Fault:
    """The fault with the session and the step in its metadata."""
    return Fault(
        fault.reason, fault.message, {"session_id": session.name, "seq": str(seq), **fault.metadata}, fault.retry_s
    )
