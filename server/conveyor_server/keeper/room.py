"""Room for sessions that come in: those that were not used for the longest leave memory for the store.

Invariant: a session leaves only when the store has all of it and nothing of it is under way; one that is not stored
never leaves.
"""

from collections.abc import Callable, Iterable

import numpy as np
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.errors import Refused
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.session import Session

# At once, so that the table is not looked over for each session that comes in; and of one look for idle ones.
_MOST_AT_ONCE = 64
# A session that has just come in is here for somebody, who may have his turn only after this one.
_LEAST_S = 0.05
_MOST_IDLE = 2048


class Room:
    """Rows of the session table. Core thread only.

    Args:
        directory: the sessions.
        passivate_after_s: idle time after which a session leaves memory; infinity: never by that.
        force: has sessions written, so that they can leave.

    Attributes:
        reserved: rows for sessions that are on their way in with the job that is out.
        promised: rows for sessions that are in the store already.
        passivated: sessions that have left memory so far.
    """

    def __init__(
        self, directory: Directory, passivate_after_s: float, force: Callable[[Iterable[Session]], None]
    ) -> None:
        self._directory = directory
        self._passivate_after_s = passivate_after_s
        self._force = force
        self.reserved = self.promised = 0
        self.passivated = 0

    def is_free(self) -> bool:
        """There is a row that is nobody's, and reserved for nobody."""
        return self._missing() < 0

    def reserve(self, now: float) -> bool:
        """Reserves a row for a session that is on its way in. False: not yet, others are about to leave.

        Raises:
            Refused: SESSIONS_EXHAUSTED, where nobody can leave.
        """
        if not self.is_free() and not self._make(now):
            return False
        self.reserved += 1
        return True

    def make_one(self, now: float) -> None:
        """Sees to it that there is a row for a session that comes in at once.

        Raises:
            Refused: SESSIONS_EXHAUSTED, where nobody can leave now.
        """
        if not self.is_free() and not self._make(now):
            raise Refused(refusals.full(self._directory.limits))

    def passivate_idle(self, now: float) -> None:
        """Has those leave that were idle for long enough."""
        table = self._directory.table
        rows = np.flatnonzero(self._quiet() & (now - table.last_used_at >= self._passivate_after_s))
        self._leave(rows[:_MOST_IDLE])

    def _missing(self) -> int:
        return self.reserved + self.promised - self._directory.table.rows.free

    def _make(self, now: float) -> bool:
        """Makes room for one more, if that can be done now."""
        table = self._directory.table
        rows = self._missing() + 1
        quiet = np.flatnonzero(self._quiet())
        if not len(quiet):
            raise Refused(refusals.full(self._directory.limits))
        quiet = quiet[now - table.last_used_at[quiet] >= _LEAST_S]
        quiet = quiet[np.argsort(table.last_used_at[quiet], kind="stable")][: max(rows, _MOST_AT_ONCE)]
        left = self._leave(quiet[table.applied_seq[quiet] <= table.durable_seq[quiet]])
        if left >= rows:
            return True
        self._force([session for row in quiet.tolist() if (session := table.sessions[row]) is not None])
        return False

    def _quiet(self) -> NDArray[np.bool_]:
        """Rows of stored sessions of which nothing is in the air."""
        table = self._directory.table
        quiet: NDArray[np.bool_] = table.durability >= session_pb2.DURABILITY_ASYNC
        quiet &= table.flight == 0
        quiet &= table.ahead == 0
        return quiet

    def _leave(self, rows: NDArray[np.int64]) -> int:
        """Passivates those of the rows whose sessions have nothing under way; returns how many that were."""
        table, count = self._directory.table, 0
        for row in rows.tolist():
            session = table.sessions[row]
            if session is None or session.pending or session.closing is not None or not session.stored:
                continue
            if table.applied_seq[row] > table.durable_seq[row]:
                continue
            held = session.attachment
            if held is not None and held.detaching:
                continue
            self._directory.passivate(session)
            count += 1
        self.passivated += count
        return count
