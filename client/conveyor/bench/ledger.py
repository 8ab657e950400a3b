"""What each session has sent and what was answered, in columns.

Invariants: a session's answers come in the order of its steps, each once; a refused step was not applied, so when all
that was sent behind it has come back too, the session goes on from its number.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conveyor.bench.spec import LoadError

Integers: TypeAlias = NDArray[np.int64]


class Ledger:
    """The steps of all sessions. Belongs to one thread.

    Args:
        sessions: how many.
        in_flight: steps of one session that are unanswered at most.

    Attributes:
        sent: number of the last step sent, `[sessions]`.
        applied: number of the last step that was applied, `[sessions]`.
        failed: refused steps, while others of the session are still on their way, `[sessions]`.
        failing: sessions for which that is so.
        unanswered: steps of all sessions that are on their way.
    """

    def __init__(self, sessions: int, in_flight: int) -> None:
        self.in_flight = in_flight
        self.sent: Integers = np.zeros(sessions, np.int64)
        self.applied: Integers = np.zeros(sessions, np.int64)
        self.failed: Integers = np.zeros(sessions, np.int64)
        self.failing = 0
        self.unanswered = 0
        # When a step was sent, or should have been: of the last `in_flight` numbers of each session.
        self._times: Integers = np.zeros(sessions * in_flight, np.int64)
        # Where a session last stands in an array, to find those that stand there twice.
        self._last: Integers = np.zeros(sessions, np.int64)
        self._index: Integers = np.arange(sessions * in_flight)

    def send(self, sessions: Integers, times_ns: Integers | int) -> Integers:
        """Numbers the next steps.

        Args:
            sessions: `[n]`; a session that stands several times must stand in one run.
            times_ns: when the latency of each begins, `[n]` or one for all.

        Returns:
            Their seqs `[n]`.
        """
        seqs = self.sent[sessions] + 1
        if self.in_flight > 1 and np.count_nonzero(sessions[1:] == sessions[:-1]):
            seqs += rank_in_run(sessions)
        self.sent[sessions] = seqs
        self._times[self._slot(sessions, seqs)] = times_ns
        self.unanswered += len(sessions)
        return seqs

    def answer(self, sessions: Integers, seqs: Integers, now_ns: int) -> Integers:
        """Takes results.

        Args:
            sessions: `[n]`, in the order in which they came.
            seqs: `[n]`.
            now_ns: when they came.

        Returns:
            Latencies `[n]` in nanoseconds.

        Raises:
            LoadError: an answer that is not the next one of its session.
        """
        expected = self.applied[sessions] + 1
        index = self._index[: len(sessions)] if len(sessions) <= len(self._index) else np.arange(len(sessions))
        self._last[sessions] = index
        if np.count_nonzero(self._last[sessions] != index):
            # A session was answered several times.
            order = np.argsort(sessions, kind="stable")
            expected[order] += rank_in_run(sessions[order])
        if np.count_nonzero(seqs != expected):
            wrong = int(np.flatnonzero(seqs != expected)[0])
            raise LoadError(f"the server answered step {seqs[wrong]} where {expected[wrong]} was due")
        # Assigned in order, so the last one stays.
        self.applied[sessions] = seqs
        self.unanswered -= len(sessions)
        took_ns: Integers = now_ns - self._times[self._slot(sessions, seqs)]
        if self.failing:
            for session in sessions.tolist():
                self._settle(session)
        return took_ns

    def fail(self, session: int, seq: int, now_ns: int) -> int:
        """Takes the refusal of a step; returns its latency in nanoseconds. See `room` for when the session goes on."""
        if not self.applied[session] < seq <= self.sent[session]:
            raise LoadError(f"the server refused step {seq}, which was not on its way")
        self.failing += not self.failed[session]
        self.failed[session] += 1
        self.unanswered -= 1
        took_ns = now_ns - int(self._times[self._slot(session, seq)])
        self._settle(session)
        return took_ns

    def _settle(self, session: int) -> None:
        """Lets a session go on from the first refused step, once nothing of it is on its way any more."""
        failed = self.failed[session]
        if failed and self.applied[session] + failed == self.sent[session]:
            self.sent[session] = self.applied[session]
            self.failed[session] = 0
            self.failing -= 1

    def room(self, sessions: Integers) -> Integers:
        """Steps `[n]` that each session may send now."""
        open_steps = self.sent[sessions] - self.applied[sessions]
        return np.where(self.failed[sessions] > 0, 0, self.in_flight - open_steps)

    def _slot(self, session: Integers | int, seq: Integers | int) -> Integers | int:
        return session if self.in_flight == 1 else session * self.in_flight + seq % self.in_flight


def rank_in_run(values: Integers) -> Integers:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(values))
    begins = np.zeros(len(values), np.int64)
    begins[1:] = np.where(values[1:] != values[:-1], index[1:], 0)
    ranks: Integers = index - np.maximum.accumulate(begins)
    return ranks
