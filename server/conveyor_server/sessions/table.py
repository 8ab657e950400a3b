"""The session table: what every step asks of a session, as columns, so that many sessions are asked at once.

Invariant: a row belongs to one session from its creation to its end. `gate` is the number of the stream whose next step
needs no more thought than its seq: 0 whenever the session is not attached, or anything but flights is under way.
"""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.slab import SlotPool

if TYPE_CHECKING:
    from conveyor_server.sessions.flight import Flight
    from conveyor_server.sessions.session import Session, SessionOptions


# Columns of SessionTable.cells.
GATE, RECORD, APPLIED_SEQ, AHEAD, CREDIT, ALOFT, FAILED_SEQ, FLIGHT = range(8)
FIRST_SEQ, LAST_SEQ, BASE_SEQ, KEPT, APPLIED_TIME_STEPS = range(8, 13)
# These are float64.
LAST_USED_AT, CREATED_AT, IDLE_TIMEOUT_S = range(13, 16)
# 128 bytes a row are two lines of the cache, where they begin with one.
_COLUMNS = 16
_CACHE_LINE = 64
# Above every durability.
NEVER = 127
# A row of cells as one item, which numpy copies faster than its columns.
_LINE = np.dtype((np.void, 8 * _COLUMNS))


class SessionTable:
    """Columns `[capacity]`, and the sessions by row. Core thread only.

    What a step asks and changes lies side by side, a row in one or two lines of the cache: steps of many sessions look
    at theirs together (`look`), reckon on what they got, and write it back at once (`put`).

    Attributes:
        rows: which are free.
        sessions: by row.
        cells: int64 `[capacity + 1, columns]`; of the last row, which is nobody's, the record is 0. The columns:
        applied_seq, applied_time_steps, failed_seq: see Session.
        credit: max_in_flight of SessionOptions.
        gate: see above.
        record: number of its engine's Record.
        flight: number of the Flight whose step of it the engine has, or 0.
        ahead: steps in flights, that one's and those parked behind it.
        aloft: flights that it is in.
        first_seq, last_seq, base_seq: the answers that its Record holds, and the seq that lies at position 0; none
            where last < first.
        kept: 1: the session keeps answers of its own beside its Record.
        created_at, last_used_at: see Session.
        idle_timeout_s: of SessionOptions; 0 in a row that is free.
        flights: by number.
        parked: those of them with members that wait for an earlier flight, the oldest first.
        durability: of SessionOptions; 0 in a row that is free.
        durable_seq: int64 `[capacity + 1]`, the last step whose state is in the store; 0 where there is none.
        saved_at: when the state was last gathered for the store; of a session that is kept there.
        paused: rows of sessions whose steps wait, whatever the engine has to do: the store is to have something first.
        tenants: by row, where there is one: whose a session is.
        of_tenant: how many rows each of them has.
        suspended_from: sessions this durable take no new steps now, because the store is away.
    """

    def __init__(self, capacity: int) -> None:
        self.rows = SlotPool(capacity)
        self.sessions: list[Session | None] = [None] * capacity
        self.cells = _aligned(capacity + 1)
        self._lines = self.cells.view(_LINE)[:, 0]
        self.applied_seq, self.applied_time_steps = self._column(APPLIED_SEQ), self._column(APPLIED_TIME_STEPS)
        self.failed_seq, self.credit = self._column(FAILED_SEQ), self._column(CREDIT)
        self.gate, self.record = self._column(GATE), self._column(RECORD)
        self.flight, self.ahead, self.aloft = self._column(FLIGHT), self._column(AHEAD), self._column(ALOFT)
        self.first_seq, self.last_seq = self._column(FIRST_SEQ), self._column(LAST_SEQ)
        self.base_seq, self.kept = self._column(BASE_SEQ), self._column(KEPT)
        self.created_at, self.last_used_at = self._moments(CREATED_AT), self._moments(LAST_USED_AT)
        self.idle_timeout_s = self._moments(IDLE_TIMEOUT_S)
        self.flights: dict[int, Flight] = {}
        self.parked: dict[int, Flight] = {}
        self.durability = np.zeros(capacity, np.int8)
        self.durable_seq = np.zeros(capacity + 1, np.int64)
        self.saved_at = np.zeros(capacity)
        self.paused: set[int] = set()
        self.tenants: dict[int, str] = {}
        self.of_tenant: Counter[str] = Counter()
        self.suspended_from = NEVER

    def look(self, where: "slice | NDArray[np.int64]") -> NDArray[np.int64]:
        """The cells of some rows `[rows, columns]`: to be read, or changed and then `put`."""
        return self.cells[where] if isinstance(where, slice) else self.cells.take(where, 0)

    def put(self, where: "slice | NDArray[np.int64]", cells: NDArray[np.int64]) -> None:
        """Writes back what `look` gave, contiguous. The rows are distinct, and nothing has changed them meanwhile."""
        # Of a slice, it was the rows themselves.
        if not isinstance(where, slice):
            self._lines[where] = cells.view(_LINE)[:, 0]

    def add(self, session: "Session", options: "SessionOptions", now: float) -> None:
        """Gives a session's row its first values."""
        row = session.row
        self.sessions[row] = session
        self.cells[row] = 0
        self.forget_answers(row)
        self.created_at[row] = self.last_used_at[row] = now
        self.idle_timeout_s[row] = options.idle_timeout_s
        self.credit[row] = options.max_in_flight
        self.durability[row] = options.durability
        if self.durable_seq[row]:
            # A write of the former one may have come back after its end.
            self.durable_seq[row] = 0
        if options.durability > session_pb2.DURABILITY_NONE:
            # Else these pages are never touched.
            self.saved_at[row] = now
        if options.tenant:
            self.tenants[row] = options.tenant
            self.of_tenant[options.tenant] += 1

    def remove(self, row: int) -> None:
        """The session is gone; its row is free."""
        self.sessions[row] = None
        self.idle_timeout_s[row] = 0.0
        self.gate[row] = 0
        self.durability[row] = 0
        if self.durable_seq[row]:
            self.durable_seq[row] = 0
        self.paused.discard(row)
        tenant = self.tenants.pop(row, "")
        if tenant:
            self.of_tenant[tenant] -= 1
            if not self.of_tenant[tenant]:
                del self.of_tenant[tenant]
        self.rows.release(row)

    def forget_answers(self, row: int) -> None:
        """The Record holds nothing for this row."""
        self.first_seq[row], self.last_seq[row] = 1, 0

    def idle(self, now: float) -> tuple[NDArray[np.int64], float]:
        """Rows whose idle limit has passed, and when the next one does. Some 10 ns for each row of the table."""
        due_at = self.last_used_at + self.idle_timeout_s
        due_at[self.idle_timeout_s == 0] = np.inf
        rows = np.flatnonzero(due_at <= now)
        due_at[rows] = np.inf
        return rows, float(due_at.min(initial=np.inf))

    def _column(self, index: int) -> NDArray[np.int64]:
        return self.cells[:-1, index]

    def _moments(self, index: int) -> NDArray[np.float64]:
        return self.cells.view(np.float64)[:-1, index]


def _aligned(rows: int) -> NDArray[np.int64]:
    """Zeros `[rows, columns]` that begin with a line of the cache."""
    size = rows * _COLUMNS * 8
    raw = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + size].view(np.int64).reshape(rows, _COLUMNS)
