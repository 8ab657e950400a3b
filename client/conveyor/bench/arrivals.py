"""When steps fall due in an open loop: at times that the server has no influence on.

Invariant: a step that fell due keeps its time, however long it has to wait here for its session to have room; its
latency counts from then. So a server that stalls cannot slow down those who would have measured the stall.
"""

import numpy as np

from conveyor.bench.ledger import Integers, Ledger, rank_in_run
from conveyor.bench.spec import LoadSpec, Pattern

_AHEAD = 4096
_NONE: Integers = np.zeros(0, np.int64)


class Arrivals:
    """Steps that fall due, and those that wait. Belongs to one thread.

    Args:
        spec: pattern, rate, sessions.
        start_ns: when the first gap begins.
        rng: of gaps and sessions.

    Attributes:
        waiting: steps that are due and not sent.
        shed: steps that fell due and never will be.
    """

    def __init__(self, spec: LoadSpec, start_ns: int, rng: np.random.Generator) -> None:
        self._spec = spec
        self._rng = rng
        self._last_ns = float(start_ns)
        self.waiting = self.shed = 0
        self._times: Integers = np.zeros(0, np.int64)
        self._sessions: Integers = np.zeros(0, np.int64)
        self._next = 0
        # Waiting steps of each session: a ring of times, from its head to its tail.
        self._ring: Integers = np.zeros((spec.sessions, 16), np.int64)
        self._head: Integers = np.zeros(spec.sessions, np.int64)
        self._tail: Integers = np.zeros(spec.sessions, np.int64)
        self._plan()

    @property
    def next_ns(self) -> int:
        """When the next step falls due."""
        return int(self._times[self._next])

    def oldest_ns(self) -> int:
        """When the first of the waiting steps fell due; there must be one."""
        waiting = np.flatnonzero(self._tail > self._head)
        return int(self._ring[waiting, self._head[waiting] % self._ring.shape[1]].min())

    def due(self, now_ns: int, freed: Integers, ledger: Ledger) -> tuple[Integers, Integers]:
        """The steps to be sent now.

        Args:
            now_ns: what is due by then.
            freed: sessions that have had an answer since the last call, `[n]`.
            ledger: says how many more steps a session may have unanswered.

        Returns:
            Sessions `[m]`, ascending, and when each of their steps fell due, `[m]`.
        """
        if not self.waiting and self.next_ns > now_ns:
            return _NONE, _NONE
        sessions, times = self._take(now_ns)
        ranks = rank_in_run(sessions)
        if self._spec.shed:
            fits = ranks < ledger.room(sessions)
            self.shed += len(sessions) - int(np.count_nonzero(fits))
            return sessions[fits], times[fits]
        if not self.waiting and not np.count_nonzero(ranks >= ledger.room(sessions)):
            return sessions, times
        self._queue(sessions, times, ranks)
        touched = np.unique(np.concatenate([sessions, freed]))
        counts = np.minimum(self._tail[touched] - self._head[touched], ledger.room(touched))
        sessions = np.repeat(touched, counts)
        times = self._ring[sessions, (self._head[sessions] + rank_in_run(sessions)) % self._ring.shape[1]]
        self._head[touched] += counts
        self.waiting -= len(sessions)
        return sessions, times

    def _take(self, now_ns: int) -> tuple[Integers, Integers]:
        """What fell due: sessions, ascending, and times, ascending within a session."""
        sessions, times = [], []
        while True:
            end = int(self._times.searchsorted(now_ns, side="right"))
            sessions.append(self._sessions[self._next : end])
            times.append(self._times[self._next : end])
            self._next = end
            if end < len(self._times):
                break
            self._plan()
        if len(sessions) == 1 and len(sessions[0]) <= 1:
            return sessions[0], times[0]
        joined = np.concatenate(sessions)
        order = np.argsort(joined, kind="stable")
        return joined[order], np.concatenate(times)[order]

    def _queue(self, sessions: Integers, times: Integers, ranks: Integers) -> None:
        """Puts steps at the ends of their sessions' rings."""
        if not sessions.size:
            return
        while int((self._tail[sessions] + ranks - self._head[sessions]).max()) >= self._ring.shape[1]:
            self._grow()
        places = self._tail[sessions] + ranks
        self._ring[sessions, places % self._ring.shape[1]] = times
        self._tail[sessions] = places + 1
        self.waiting += len(sessions)

    def _grow(self) -> None:
        """Doubles the rings."""
        size = self._ring.shape[1]
        self._ring = np.take_along_axis(self._ring, (self._head[:, None] + np.arange(size)) % size, axis=1)
        self._ring = np.concatenate([self._ring, np.zeros_like(self._ring)], axis=1)
        self._tail -= self._head
        self._head[:] = 0

    def _plan(self) -> None:
        """Draws the next times."""
        spec = self._spec
        if spec.pattern is Pattern.POISSON:
            times = self._last_ns + np.cumsum(self._rng.exponential(1e9 / spec.rate_per_s, _AHEAD))
            self._last_ns = float(times[-1])
        else:
            self._last_ns += spec.burst_s * 1e9
            times = np.full(max(1, round(spec.rate_per_s * spec.burst_s)), self._last_ns)
        self._times = times.astype(np.int64)
        self._sessions = self._rng.integers(0, spec.sessions, len(times))
        self._next = 0
