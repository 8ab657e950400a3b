"""A session's unanswered steps, and which of them may be sent now.

Invariant: on one stream each step is sent once, in order, and never are more than two messages of a session unanswered.
What is submitted meanwhile gathers and goes in one message: a pipelined session costs two messages for each window of
steps, its next ones are there when the server is done with those before, and nothing ever waits for a timer. Steps that
were answered before and are sent again go first, and count against the credit of the stream, not of the application.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

from conveyor._core.step import Step

_SEQ = attrgetter("seq")
# One that the server works on, and one that it has when that is done.
_MESSAGES = 2


class Window:
    """Unanswered steps in the order of their numbers."""

    __slots__ = ("_again", "_ends", "_steps", "_unsent")

    def __init__(self) -> None:
        self._steps: dict[int, Step] = {}
        # Those that were answered on another stream, and not yet on this one.
        self._again: dict[int, Step] = {}
        # Those that this stream was not given.
        self._unsent: deque[Step] = deque()
        # The last step of each message that may be unanswered.
        self._ends: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps.values())

    @property
    def oldest(self) -> Step:
        """The first that is unanswered. Only where there is one."""
        return next(iter(self._steps.values()))

    @property
    def newest(self) -> Step:
        """The last. Only where there is one."""
        return next(reversed(self._steps.values()))

    @property
    def unsent(self) -> bool:
        """Some step was not given to this stream."""
        return bool(self._unsent)

    @property
    def again(self) -> bool:
        """Some step that was answered before is unanswered on this stream."""
        return bool(self._again)

    @property
    def first_again(self) -> int:
        """The first of those. Only where there is one."""
        return next(iter(self._again))

    @property
    def on_stream(self) -> int:
        """How many this stream was given and has not answered."""
        return len(self._steps) + len(self._again) - len(self._unsent)

    def find(self, seq: int) -> Step | None:
        """The step of that number, while it is unanswered."""
        return self._steps.get(seq)

    def add(self, step: Step) -> None:
        """Puts a step behind the others, where it waits to be taken."""
        while self._ends and self._ends[-1] >= step.seq:
            # Its number was another step's, which was refused, and so were all after that.
            self._ends.pop()
        self._steps[step.seq] = step
        self._unsent.append(step)

    def pop(self, seq: int) -> Step | None:
        """Takes out what was answered or refused."""
        return self._steps.pop(seq, None)

    def is_again(self, seq: int) -> bool:
        """The step of that number was answered before, and is unanswered on this stream."""
        return seq in self._again

    def pop_again(self, seq: int) -> None:
        """A step that was answered before is answered on this stream too."""
        self._again.pop(seq, None)

    def drop_unsent(self) -> Sequence[Step]:
        """Takes out what this stream was not given."""
        dropped, self._unsent = self._unsent, deque()
        return [step for step in dropped if self._steps.pop(step.seq, None) is not None]

    def drop_from(self, seq: int) -> Sequence[Step]:
        """Takes out that step and all after it, wherever they are."""
        dropped = [step for step in self if step.seq >= seq]
        for step in dropped:
            del self._steps[step.seq]
        self._unsent = deque(step for step in self._unsent if step.seq < seq)
        return dropped

    def drop_all(self) -> Sequence[Step]:
        """Takes out everything."""
        dropped = list(self)
        self._steps.clear()
        self._again.clear()
        self._unsent.clear()
        return dropped

    def begin(self, again: Sequence[Step]) -> None:
        """A new stream was given nothing, and lacks `again` too, which were answered and come before all others."""
        self._again = {step.seq: step for step in again}
        self.rewind()

    def rewind(self) -> None:
        """All that is unanswered shall be sent anew."""
        self._unsent = deque(sorted([*self._again.values(), *self._steps.values()], key=_SEQ))
        self._ends.clear()

    def may_send(self) -> bool:
        """`take` would give something."""
        if not self._unsent:
            return False
        while self._ends and self._ends[0] not in self._steps and self._ends[0] not in self._again:
            self._ends.popleft()
        return len(self._ends) < _MESSAGES

    def take(self, credit: int) -> Sequence[Step]:
        """The steps of the next message, which are sent from now on; none: nothing may be sent now.

        Args:
            credit: steps that may be unanswered. Half of them are taken at most, so that the other half travels while
                the first is worked on.
        """
        if not self.may_send():
            return ()
        longest = (credit + _MESSAGES - 1) // _MESSAGES
        if self._again:
            # Without these there are never more than the credit in all.
            longest = min(longest, credit - self.on_stream)
            if longest < 1:
                return ()
        first = last = self._unsent.popleft()
        steps = [first]
        while self._unsent and len(steps) < longest:
            step = self._unsent[0]
            if step.seq != last.seq + 1 or step.timeout_ms != first.timeout_ms:
                break
            last = self._unsent.popleft()
            steps.append(last)
        self._ends.append(last.seq)
        return steps
