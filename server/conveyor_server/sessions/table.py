"""The session table: what every step asks of a session, as columns, so that many sessions are asked at once.

Invariant: a row belongs to one session from its creation to its end. `gate` is the number of the stream whose next step
needs no more thought than its seq: 0 whenever the session is not attached, or anything but flights is under way.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conveyor_server.slab import SlotPool

if TYPE_CHECKING:
    from conveyor_server.sessions.flight import Flight
    from conveyor_server.sessions.session import Session, SessionOptions


class SessionTable:
    """Columns `[capacity]`, and the sessions by row. Core thread only.

    Attributes:
        rows: which are free.
        sessions: by row.
        applied_seq, applied_time_steps, failed_seq, created_at, last_used_at: see Session.
        credit: max_in_flight of SessionOptions.
        idle_timeout_s: of SessionOptions; infinity in a row that is free.
        gate: see above.
        record: number of its engine's Record.
        flight: number of the Flight whose step of it the engine has, or 0.
        ahead: steps in flights, that one's and those parked behind it.
        aloft: flights that it is in.
        first_seq, last_seq, base_seq: the answers that its Record holds, and the seq that lies at position 0; none
            where last < first.
        kept: the session keeps answers of its own beside its Record.
        flights: by number.
        parked: those of them with members that wait for an earlier flight, the oldest first.
    """

    def __init__(self, capacity: int) -> None:
        self.rows = SlotPool(capacity)
        self.sessions: list[Session | None] = [None] * capacity
        self.applied_seq = np.zeros(capacity, np.int64)
        self.applied_time_steps = np.zeros(capacity, np.int64)
        self.failed_seq = np.zeros(capacity, np.int64)
        self.created_at = np.zeros(capacity, np.float64)
        self.last_used_at = np.zeros(capacity, np.float64)
        self.idle_timeout_s = np.full(capacity, np.inf)
        self.credit = np.zeros(capacity, np.int64)
        self.gate = np.zeros(capacity, np.int64)
        self.record = np.zeros(capacity, np.int32)
        self.flight = np.zeros(capacity, np.int64)
        self.ahead = np.zeros(capacity, np.int32)
        self.aloft = np.zeros(capacity, np.int32)
        self.first_seq = np.zeros(capacity, np.int64)
        self.last_seq = np.zeros(capacity, np.int64)
        self.base_seq = np.zeros(capacity, np.int64)
        self.kept = np.zeros(capacity, np.bool_)
        self.flights: dict[int, Flight] = {}
        self.parked: dict[int, Flight] = {}

    def add(self, session: "Session", options: "SessionOptions", now: float) -> None:
        """Gives a session's row its first values."""
        row = session.row
        self.sessions[row] = session
        for column in (self.applied_seq, self.applied_time_steps, self.failed_seq, self.gate, self.flight):
            column[row] = 0
        self.ahead[row] = self.aloft[row] = 0
        self.forget_answers(row)
        self.kept[row] = False
        self.created_at[row] = self.last_used_at[row] = now
        self.idle_timeout_s[row] = options.idle_timeout_s
        self.credit[row] = options.max_in_flight

    def remove(self, row: int) -> None:
        """The session is gone; its row is free."""
        self.sessions[row] = None
        self.idle_timeout_s[row] = np.inf
        self.gate[row] = 0
        self.rows.release(row)

    def forget_answers(self, row: int) -> None:
        """The Record holds nothing for this row."""
        self.first_seq[row], self.last_seq[row] = 1, 0

    def idle(self, now: float) -> tuple[NDArray[np.int64], float]:
        """Rows whose idle limit has passed, and when the next one does. Some 3 ns for each row of the table."""
        due_at = self.last_used_at + self.idle_timeout_s
        rows = np.flatnonzero(due_at <= now)
        due_at[rows] = np.inf
        return rows, float(due_at.min(initial=np.inf))
