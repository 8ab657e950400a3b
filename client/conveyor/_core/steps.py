"""A session's steps: numbered, kept until they are answered and stored, and what follows when one is refused.

Invariant: a step's number and content are bound to each other from `submit` until the step is answered and, where the
server's store is written later than answers leave, until the store has it.
"""

from collections.abc import Iterable
from typing import Any

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.answer import Answer
from conveyor._core.attachment import Attachment
from conveyor._core.setback import Setback
from conveyor._core.signature import Prepared, Signature
from conveyor._core.step import Parcel, Step
from conveyor._core.ticket import Ticket
from conveyor._core.unstored import Unstored
from conveyor._core.verdict import FOLLOWS, Verdict, verdict
from conveyor._core.window import Window
from conveyor.errors import ConveyorError


class Steps:
    """One session's, through all its streams.

    Attributes:
        window: those that are unanswered.
        unstored: those that the server's store does not have.
        setback: what this stream refused for now.
    """

    __slots__ = ("_attachment", "_credit", "_next_seq", "_stalled", "setback", "unstored", "window")

    def __init__(self, attachment: Attachment, resend_buffer_bytes: int) -> None:
        self.window = Window()
        self.unstored = Unstored(resend_buffer_bytes)
        self.setback = Setback()
        self._attachment = attachment
        self._next_seq = 1
        # Steps from _next_seq on follow a refused one and await their own refusal.
        self._stalled = False
        # Steps that may be unanswered.
        self._credit = 1

    @property
    def applied_seq(self) -> int:
        """Steps whose answers are here: all before the first one that is unanswered."""
        if not self.window:
            return self._next_seq - 1
        return min(self.window.oldest.seq, self._next_seq) - 1

    @property
    def pending(self) -> bool:
        """Some step is unanswered on this stream, or shall be stored and is not."""
        return bool(self.window) or self.window.again or bool(self.unstored)

    def blocker(self) -> Ticket[Any] | None:
        """What to wait for before `submit` may be called; None: nothing."""
        if self._stalled:
            if self.window and self.window.newest.seq >= self._next_seq:
                return self.window.newest.ticket
            self._stalled = False
        if len(self.window) >= self._credit:
            return self.window.oldest.ticket
        if self.unstored.full:
            return self.unstored.buffer.room()
        return None

    def submit(self, prepared: Prepared, timeout_ms: int) -> Step:
        """Numbers a step. Only where `blocker` gave None."""
        step = Step(self._next_seq, prepared, timeout_ms, Ticket())
        self.window.add(step)
        self._next_seq += 1
        self.unstored.submitted(step)
        return step

    def take(self, signature: Signature) -> Parcel | None:
        """What goes in the next message; None: nothing may be sent now."""
        steps = self.window.take(self._credit)
        if not steps:
            return None
        # What is sent again is not acknowledged, for the server has not answered it yet.
        acked_seq = self.window.first_again - 1 if self.window.again else self.applied_seq
        return Parcel(signature, self._attachment.handle, acked_seq, steps)

    @property
    def told(self) -> bool:
        """Some were refused for now, and the server has spoken about all that this stream was given."""
        return self.setback.told(self.window.on_stream)

    # ------------------------------------------------------------ answers

    def answered(self, seq: int, answer: Answer) -> None:
        """A step was applied, now or earlier; nobody is told an answer twice."""
        step = self.window.pop(seq)
        if step is None:
            self.window.pop_again(seq)
            return
        self.unstored.answered(step)
        step.ticket.resolve(answer)

    def refused(self, seq: int, error: ConveyorError, *, held: bool) -> Verdict:
        """A step was refused. What follows for the session is the caller's, as the verdict says."""
        step, again = self.window.find(seq), self.window.is_again(seq)
        if step is None and not again:
            return Verdict.ABORTED
        if error.reason in FOLLOWS and self.setback.covers(seq):
            self.setback.followed(seq)
            return Verdict.ABORTED
        kind = verdict(error, held=held, again=again)
        if kind is Verdict.RESEND or kind is Verdict.LATER:
            self.setback.refused(seq, error if kind is Verdict.LATER else None)
        elif kind is Verdict.APPLIED or kind is Verdict.REFUSED or kind is Verdict.ABORTED:
            if step is None:
                self.window.pop_again(seq)
            else:
                self._settle(step, error, applied=kind is Verdict.APPLIED)
        return kind

    def _settle(self, step: Step, error: ConveyorError, *, applied: bool) -> None:
        """A step was not applied; or it was, and its answer is lost."""
        self.window.pop(step.seq)
        if applied:
            self.unstored.answered(step)
        else:
            self.unstored.refused(step)
        step.ticket.fail(error)
        if not applied:
            self._next_seq = min(self._next_seq, step.seq, int(error.metadata.get("next_seq", step.seq)))
            self._stalled = True
            # No stream was given these, and none shall be: the server would refuse them like those that it has.
            self._abort(self.window.drop_unsent())

    # ------------------------------------------------------------ streams

    def check(self, applied: int) -> ConveyorError | None:
        """Whether a session that a server has at `applied` can be gone on with."""
        sent = max(self.window.newest.seq if self.window else 0, self._next_seq - 1)
        answered = self.applied_seq
        kept_from = self.unstored.oldest if self.unstored else answered + 1
        return self._attachment.check_progress(applied, kept_from, answered, sent)

    def begin(self, info: pb.SessionInfo, *, first: bool) -> None:
        """A stream takes steps from here on. What its server lacks is sent again, and first."""
        self._credit = max(1, info.max_in_flight)
        if first:
            self._next_seq = info.applied_seq + 1
        self.window.begin(self.unstored.after(info.applied_seq))
        self.unstored.granted(info, self.window)

    def retry(self) -> None:
        """What this stream refused for now is sent on it again."""
        self.setback.clear()
        self._abort(self.window.drop_from(self._next_seq))
        self.window.rewind()

    def suspend(self) -> None:
        """The stream is gone: what followed a refused step is refused with it; the rest is sent again."""
        self.setback.clear()
        self._abort(self.window.drop_from(self._next_seq))

    def end(self, error: ConveyorError) -> None:
        """Nothing is sent any more."""
        for step in self.window.drop_all():
            step.ticket.fail(error)
        self.unstored.end(error)

    def _abort(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.unstored.refused(step)
            step.ticket.fail(self._attachment.aborted(step.seq, self._next_seq))
