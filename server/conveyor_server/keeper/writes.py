"""What is written to the store, and when: checkpoints, what has to be there before a session leaves, and ends.

Invariants: a session's writes carry the epoch under which this server holds it, so that the store refuses them once
somebody else does; `durable_seq` moves only when the store has said so. Which sessions are due is read off the session
table, all at once: no step ever pays for being written later.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from conveyor_server.keeper import head
from conveyor_server.keeper.gather import gather
from conveyor_server.keeper.held import disown
from conveyor_server.keeper.job import Job, Save
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.sessions import refusals
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.session import Session
from conveyor_server.store.contract import Outcome

# Of one job: more wait for the next, so that those who want to be let in do not wait for all of them.
_MOST_ROWS = 2048
_MOST_BYTES = 32 << 20
# How often due sessions and idle ones are looked for, in a checkpoint's time or in that after which an idle one leaves
# memory; and at most 1 % of the time of a large table.
_LOOKS = 4
_LOOK_S = 4e-6


class Writes:
    """Checkpoints and ends of sessions. Core thread only.

    Args:
        directory: the sessions.
        policy: when they are written.
        wall: unix seconds of a moment of the driver's clock.
    """

    def __init__(self, directory: Directory, policy: KeeperPolicy, wall: Callable[[float], float]) -> None:
        self._directory = directory
        self._table = directory.table
        self._policy = policy
        self._wall = wall
        # Written with the next job, due or not.
        self._forced: dict[Session, None] = {}
        # Called with the session once it is written up to a step.
        self._waiters: dict[Session, list[tuple[int, Callable[[Session], None]]]] = {}
        self._ending: dict[Session, None] = {}
        # Of another version of their model, which the store does not know yet.
        self._moved: dict[Session, None] = {}
        self._look_at = 0.0

    # ------------------------------------------------------------ asked for

    def flush(self, session: Session, then: Callable[[Session], None]) -> None:
        """Calls back once all that the session has applied is in the store, or it is not here any more."""
        if self.is_durable(session):
            then(session)
            return
        self._forced[session] = None
        self._waiters.setdefault(session, []).append((session.applied_seq, then))

    def force(self, sessions: Iterable[Session]) -> None:
        """Writes what these sessions have applied with the next job."""
        for session in sessions:
            if not self.is_durable(session):
                self._forced[session] = None

    def move(self, session: Session) -> None:
        """Writes the session's head anew with the next job, and its state with it; then it goes on."""
        self._moved[session] = None

    def end(self, session: Session) -> None:
        """Removes the session's record with the next job; then it settles, no longer stored."""
        self._ending[session] = None

    @staticmethod
    def is_durable(session: Session, seq: int | None = None) -> bool:
        """The store has what it has applied, all of it or up to a step."""
        return session.durable_seq >= (session.applied_seq if seq is None else seq)

    @property
    def urgent(self) -> bool:
        """Somebody waits for a write."""
        return bool(self._forced or self._ending or self._moved)

    def lag(self, now: float) -> tuple[int, float]:
        """Stored sessions that have applied more than the store knows of, and for how long one of them has."""
        table = self._table
        stored = table.durability >= session_pb2.DURABILITY_ASYNC
        behind = np.flatnonzero(stored & (table.applied_seq > table.durable_seq[:-1]))
        return len(behind), float(now - table.saved_at[behind].min()) if len(behind) else 0.0

    @property
    def undurable(self) -> int:
        """Stored sessions that have applied more than the store knows of."""
        return self.lag(0.0)[0]

    def next_look_at(self) -> float:
        """When due sessions are looked for again; infinity: there are no stored ones."""
        return self._look_at if (self._table.durability >= session_pb2.DURABILITY_ASYNC).any() else math.inf

    # ------------------------------------------------------------ a job

    def add_to(self, job: Job, now: float, *, sync: bool) -> bool:
        """Adds what is due, and what somebody waits for. With `sync`, answers wait for sessions that are SYNC.

        False: it was too much for one job, and some of these wait for the next.
        """
        if self._waiters:
            # Some of them may be gone.
            self._tell()
        rows = self._due(now, sync=sync)
        forced = [session.row for session in self._forced if session.stored and not session.asleep]
        self._forced.clear()
        if forced:
            rows = np.unique(np.concatenate([rows, np.array(forced, np.int64)]))
            table = self._table
            rows = rows[table.applied_seq[rows] > table.durable_seq[rows]]
        for session in list(self._moved):
            if not session.stored:
                del self._moved[session]
        if self._moved:
            rows = np.unique(np.concatenate([rows, np.array([session.row for session in self._moved], np.int64)]))
        whole = self._gather(job, rows, now) if len(rows) else True
        saved = {session for save in job.saves for session in save.sessions} if self._waiters else set()
        for session in self._ending:
            # Whoever waits for a step of its is answered before it goes.
            if session not in self._waiters or session in saved:
                job.deletes.append((session, session.epoch))
        return whole

    def done(self, job: Job, now: float) -> None:
        """Takes back a job that was run, as far as it was."""
        if job.saved is not None:
            self._saved(job, job.saved, now)
        else:
            # Some of them were asked for by somebody.
            self._forced |= {
                session: None for save in job.saves for session in save.sessions if session in self._waiters
            }
        if job.deleted is not None:
            for (session, epoch), outcome in zip(job.deletes, job.deleted, strict=True):
                self._deleted(session, epoch, outcome, now)

    def give_up(self) -> None:
        """Nobody's leaving waits for the store any more: the server stops."""
        waiters, self._waiters = self._waiters, {}
        for session, waiting in waiters.items():
            for _, then in waiting:
                then(session)

    def _due(self, now: float, *, sync: bool) -> NDArray[np.int64]:
        table, policy = self._table, self._policy
        looks = now >= self._look_at
        if not looks and not sync:
            return np.empty(0, np.int64)
        behind = table.applied_seq - table.durable_seq[:-1]
        dirty = (table.durability >= session_pb2.DURABILITY_ASYNC) & (behind > 0)
        due = table.durability == session_pb2.DURABILITY_SYNC
        if looks:
            soon_s = min(policy.checkpoint_s, policy.passivate_after_s) / _LOOKS
            self._look_at = now + max(soon_s, _LOOK_S * len(table.sessions))
            due = due | (behind >= policy.checkpoint_steps) | (now - table.saved_at >= policy.checkpoint_s)
        return np.flatnonzero(dirty & due)

    def _gather(self, job: Job, rows: NDArray[np.int64], now: float) -> bool:
        """Copies what is written; False: not all of those that are SYNC, of which answers may wait."""
        table, wall = self._table, self._wall
        sync = int((table.durability[rows] == session_pb2.DURABILITY_SYNC).sum())
        if len(rows) > _MOST_ROWS:
            # Those whose answers wait, and those that have waited longest.
            later = table.durability[rows] != session_pb2.DURABILITY_SYNC
            rows = rows[np.lexsort((table.saved_at[rows], later))[:_MOST_ROWS]]
            self._look_at = now
        table.saved_at[rows] = now
        taken = 0
        for sessions, piece in gather(table, rows, wall):
            where = np.array([session.row for session in sessions])
            expires = wall(now) + np.maximum(table.idle_timeout_s[where], 0.0)
            save = Save(sessions, where, [session.epoch for session in sessions], expires.tolist(), piece)
            if self._moved:
                save.heads = {
                    index: head.encode(session.id, session.engine, session.options, wall(session.created_at))
                    for index, session in enumerate(sessions)
                    if session in self._moved
                }
            job.saves.append(save)
            sync -= int((table.durability[where] == session_pb2.DURABILITY_SYNC).sum())
            taken += sum(array.nbytes for array in piece.states)
            if taken > _MOST_BYTES:
                # What is left is due still.
                self._look_at = now
                break
        return not sync

    # ------------------------------------------------------------ its answers

    def _saved(self, job: Job, outcomes: Sequence[Outcome], now: float) -> None:
        table, at = self._table, 0
        for save in job.saves:
            part = outcomes[at : at + len(save.sessions)]
            at += len(save.sessions)
            # A session may have left its row while it was written.
            here = [table.sessions[row] is one for row, one in zip(save.rows.tolist(), save.sessions, strict=True)]
            good = np.array(here) & (np.array(part) == Outcome.DONE)
            rows, seqs = save.rows[good], save.piece.seqs[good]
            table.durable_seq[rows] = np.maximum(table.durable_seq[rows], seqs)
            for index in save.heads:
                if here[index] and part[index] == Outcome.DONE and self._moved.pop(save.sessions[index], 0) is None:
                    self._directory.go_on(save.sessions[index])
            for index in np.flatnonzero(~good).tolist():
                if here[index] and part[index] != Outcome.DONE:
                    self._refused(save.sessions[index], save.epochs[index], part[index], now)
        if self._waiters:
            self._tell()

    def _refused(self, session: Session, epoch: int, outcome: Outcome, now: float) -> None:
        """The store has not taken a session's state."""
        if session.epoch != epoch or not session.stored:
            # It was taken again by this server while the write was on its way.
            return
        if outcome == Outcome.FENCED:
            why = refusals.taken_over(session)
            disown(self._directory, session, why, session_pb2.DETACH_CAUSE_TAKEN_OVER, now)
        else:
            disown(self._directory, session, refusals.lost(session), session_pb2.DETACH_CAUSE_CLOSED, now)

    def _deleted(self, session: Session, epoch: int, outcome: Outcome, now: float) -> None:
        if session not in self._ending:
            return
        del self._ending[session]
        if outcome == Outcome.FENCED and session.epoch == epoch:
            # It is somebody else's, who goes on with it.
            session.stored = False
            disown(self._directory, session, refusals.taken_over(session), session_pb2.DETACH_CAUSE_TAKEN_OVER, now)
            return
        session.stored = False
        self._directory.settle(session)

    def _tell(self) -> None:
        for session, waiting in list(self._waiters.items()):
            durable = session.applied_seq if not session.stored else session.durable_seq
            ready = [then for seq, then in waiting if seq <= durable or not session.stored]
            left = [(seq, then) for seq, then in waiting if seq > durable and session.stored]
            if left:
                self._waiters[session] = left
                self._forced[session] = None
            else:
                del self._waiters[session]
            for then in ready:
                then(session)
