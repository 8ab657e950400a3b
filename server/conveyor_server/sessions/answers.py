"""A session's last answers, so that a step sent again is answered and not applied again.

Invariant: seqs are consecutive and end with the session's applied_seq; there are never more than its credit, so that a
client that resumes misses none. One-token answers lie in the engine's Record, longer ones in a ring of the session's
own; the ring's are older than the record's.
"""

from collections import deque
from typing import TYPE_CHECKING

from conveyor_server.sessions.record import Recorded

if TYPE_CHECKING:
    from conveyor_server.sessions.session import Session


class Answers:
    """The answers of one session. Core thread only."""

    __slots__ = ("_session",)

    def __init__(self, session: "Session") -> None:
        self._session = session

    @property
    def oldest_seq(self) -> int:
        """The oldest seq that can be replayed; 0: none."""
        session, table = self._session, self._session.table
        self.trim()
        if session.ring:
            return session.ring[0].seq
        first, last = int(table.first_seq[session.row]), int(table.last_seq[session.row])
        return first if first <= last else 0

    def add(self, answer: Recorded) -> None:
        """Records the answer of the next seq; the oldest makes room."""
        session = self._session
        if answer.length == 1:
            session.record.add_one(session.row, answer)
            self.trim()
            return
        table, row = session.table, session.row
        ring = session.ring = deque(session.ring)
        held = (session.record.get(row, seq) for seq in range(int(table.first_seq[row]), int(table.last_seq[row]) + 1))
        ring.extend(recorded for recorded in held if recorded is not None)
        ring.append(answer)
        table.forget_answers(row)
        table.kept[row] = True
        self.trim()

    def get(self, seq: int) -> Recorded | None:
        """The answer of `seq`, or None when it is no longer kept."""
        self.trim()
        for recorded in self._session.ring:
            if recorded.seq == seq:
                return recorded
        return self._session.record.get(self._session.row, seq)

    def forget(self, acked_seq: int) -> None:
        """Drops answers that the client says it holds."""
        session = self._session
        session.record.acknowledge_one(session.row, acked_seq)
        self.trim(acked_seq)

    def trim(self, acked_seq: int = 0) -> None:
        """Drops from the ring what is acknowledged or past the credit."""
        session = self._session
        ring = session.ring
        if not ring:
            return
        newest = max(ring[-1].seq, int(session.table.last_seq[session.row]))
        oldest = max(newest - int(session.table.credit[session.row]), acked_seq)
        while ring and ring[0].seq <= oldest:
            ring.popleft()
        if not ring:
            session.ring = NO_ANSWERS
            session.table.kept[session.row] = False


# Shared by all sessions that keep none of their own: an empty deque takes 700 bytes.
NO_ANSWERS: deque[Recorded] = deque(maxlen=0)
