"""What a server's store does not have of a session: the steps that may have to be sent again, and who waits for it.

Invariant: from a step's submission until the store has it, it counts against the buffer; from its answer until then its
inputs are kept, in order and without gaps.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.answer import Answer
from conveyor._core.step import Step
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError

RESEND_BUFFER_BYTES = 8 << 20
# A step of a few bytes costs its objects.
RESEND_BUFFER_STEPS = 4096
_SEQ = attrgetter("seq")
_STORED = frozenset({pb.DURABILITY_ASYNC, pb.DURABILITY_SYNC})


class Buffer:
    """Counts what the store does not have, and says when that is much and when it is too much."""

    __slots__ = ("_bytes", "_limit_bytes", "_room", "_steps")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = self._steps = 0
        self._room: Ticket[None] | None = None

    @property
    def full(self) -> bool:
        """No step more may be submitted; so one that is larger than the whole buffer may be when there is no other."""
        return self._bytes >= self._limit_bytes or self._steps >= RESEND_BUFFER_STEPS

    @property
    def half_full(self) -> bool:
        """The store should be asked to catch up."""
        return 2 * self._bytes >= self._limit_bytes or 2 * self._steps >= RESEND_BUFFER_STEPS

    @property
    def waited_for(self) -> bool:
        """Somebody waits for room."""
        return self._room is not None

    def add(self, size: int) -> None:
        """A step was submitted."""
        self._bytes += size
        self._steps += 1

    def remove(self, size: int) -> None:
        """A step is in the store, or was refused."""
        self._bytes -= size
        self._steps -= 1
        if self._room is not None and not self.full:
            self.wake()

    def room(self) -> Ticket[None]:
        """Settled once it is worth asking again."""
        if self._room is None:
            self._room = Ticket()
        return self._room

    def wake(self) -> None:
        """Whoever waits for room asks again."""
        room, self._room = self._room, None
        if room is not None:
            room.resolve(None)


class Unstored:
    """One session's steps that the store does not have.

    Attributes:
        stored: the session is kept in a store.
        durable: the last step that the store has, as far as was heard; 0 without a store.
        buffer: what is submitted and not in the store.
        flushing: the server was asked for a flush and has not answered.
    """

    __slots__ = ("_flush_to", "_keeps", "_kept", "_waiting", "buffer", "durable", "flushing", "stored")

    def __init__(self, limit_bytes: int) -> None:
        self.stored = False
        self.durable = 0
        self.buffer = Buffer(limit_bytes)
        self.flushing = False
        # Answers may leave before the store has their steps.
        self._keeps = False
        self._kept: deque[Step] = deque()
        self._waiting: list[tuple[int, Ticket[int]]] = []
        self._flush_to = 0

    def __bool__(self) -> bool:
        """Steps are kept."""
        return bool(self._kept)

    @property
    def keeps(self) -> bool:
        """Steps are kept after their answers."""
        return self._keeps

    @property
    def oldest(self) -> int:
        """The first step that is kept. Only where there is one."""
        return self._kept[0].seq

    @property
    def full(self) -> bool:
        """Nothing more may be submitted until the store has more."""
        return self._keeps and self.buffer.full

    @property
    def waited_for(self) -> bool:
        """Somebody waits for the store."""
        return bool(self._waiting) or self.buffer.waited_for

    @property
    def wants_flush(self) -> bool:
        """The server should be asked for a flush now."""
        if self.flushing:
            return False
        return self._flush_to > self.durable or (bool(self._kept) and self.buffer.half_full)

    def granted(self, info: pb.SessionInfo, unanswered: Iterable[Step]) -> None:
        """A server has the session as it says."""
        if info.durability == pb.DURABILITY_ASYNC and not self._keeps:
            self._keeps = True
            for step in unanswered:
                self.submitted(step)
        if info.durability in _STORED and not self.stored:
            self.stored = True
            # What it has and the store has not was another client's, and is not here to be sent again.
            self._flush_to = info.applied_seq
        self.flushing = False
        self.moved(info.durable_seq)

    def submitted(self, step: Step) -> None:
        """A step is on its way."""
        if self._keeps:
            self.buffer.add(_size(step))

    def answered(self, step: Step) -> None:
        """It was applied."""
        if not self._keeps:
            return
        if step.seq <= self.durable:
            self.buffer.remove(_size(step))
        else:
            # Without its ticket, which holds the answer. Whoever had that does not mind how long the next one takes.
            self._kept.append(Step(step.seq, step.prepared, 0, _ANSWERED))
            if len(self._kept) > 1 and self._kept[-2].seq > step.seq:
                # It was refused for now, and what followed it was not.
                self._kept = deque(sorted(self._kept, key=_SEQ))

    def refused(self, step: Step) -> None:
        """It was not applied, and will not be."""
        if self._keeps:
            self.buffer.remove(_size(step))

    def moved(self, seq: int) -> None:
        """The store has the steps up to that one."""
        if seq <= self.durable:
            return
        self.durable = seq
        while self._kept and self._kept[0].seq <= seq:
            self.buffer.remove(_size(self._kept.popleft()))
        if self._waiting:
            done = [ticket for target, ticket in self._waiting if target <= seq]
            self._waiting = [waiting for waiting in self._waiting if waiting[0] > seq]
            for ticket in done:
                ticket.resolve(seq)

    def after(self, applied: int) -> Sequence[Step]:
        """The steps that a server lacks which has the session at `applied`."""
        return [step for step in self._kept if step.seq > applied]

    def flush(self, target: int) -> Ticket[int]:
        """Settled with `durable` once the store has that step; `wants_flush` until then."""
        ticket: Ticket[int] = Ticket()
        if target <= self.durable:
            ticket.resolve(self.durable)
        else:
            self._waiting.append((target, ticket))
            self._flush_to = max(self._flush_to, target)
        return ticket

    def refuse(self, error: ConveyorError) -> None:
        """The store did not catch up in time."""
        self._flush_to = 0
        waiting, self._waiting = self._waiting, []
        for _, ticket in waiting:
            ticket.fail(error)

    def end(self, error: ConveyorError) -> None:
        """The session has ended here."""
        self._kept.clear()
        self.refuse(error)
        self.buffer.wake()


def _size(step: Step) -> int:
    return sum(map(len, step.prepared.data))


_ANSWERED: Ticket[Answer] = Ticket()
_ANSWERED.resolve(Answer((), replayed=False))
