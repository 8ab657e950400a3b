"""The states and last answers of many sessions as of this moment, copied so that they can be written elsewhere.

Invariant: what is gathered of a session is one moment's, between two of its steps: the table, the committed slot and
the record move together on the core thread, where this runs; a run that is under way writes other slots.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from conveyor_proto.codec import Array
from numpy.typing import NDArray

from conveyor_server.engine.engine import Engine
from conveyor_server.keeper.body import Piece, seeds
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import SessionTable


def gather(
    table: SessionTable, rows: NDArray[np.int64], wall: Callable[[float], float]
) -> Iterator[tuple[list[Session], Piece]]:
    """The sessions of these rows, in parts, each as a Piece of the same order. Core thread only.

    Args:
        table: the sessions.
        rows: distinct, of sessions that live.
        wall: unix seconds of a moment of the driver's clock.
    """
    numbers = table.record[rows]
    for number in np.unique(numbers).tolist():
        mine = rows[numbers == number]
        session = table.sessions[int(mine[0])]
        if session is None:
            raise AssertionError("a row of nobody is to be written")
        yield from _of_engine(table, mine, session.engine, session.record, wall)


def _of_engine(
    table: SessionTable, rows: NDArray[np.int64], engine: Engine, record: Record, wall: Callable[[float], float]
) -> Iterator[tuple[list[Session], Piece]]:
    held = engine.lanes.held[rows]
    counts = np.maximum(0, table.last_seq[rows] - table.first_seq[rows] + 1)
    # Longer answers lie beside the record, a session's own.
    kept = table.kept[rows] > 0
    kinds = np.where(kept, -1, counts) * 2 + (held > 0)
    for kind in np.unique(kinds).tolist():
        mine = rows[kinds == kind]
        if kind < 0:
            for row in mine.tolist():
                yield _piece(table, np.array([row]), engine, _own_answers(table, row), wall)
        else:
            yield _piece(table, mine, engine, _answers(table, mine, record, kind // 2), wall)


Answers = list[tuple[NDArray[np.int64], NDArray[np.uint64], int, Sequence[Array]]]


def _piece(
    table: SessionTable,
    rows: NDArray[np.int64],
    engine: Engine,
    answers: Answers,
    wall: Callable[[float], float],
) -> tuple[list[Session], Piece]:
    sessions = [session for row in rows.tolist() if (session := table.sessions[row]) is not None]
    slots = engine.lanes.held[rows] - 1
    states: Sequence[Array] = []
    if slots[0] >= 0:
        # All of them have one, or none has.
        states = engine.runner.read_rows(slots.tolist())
    offset_s = wall(0.0)
    piece = Piece(
        seeds([session.id for session in sessions], engine.spec.digest),
        table.applied_seq[rows],
        table.applied_time_steps[rows],
        table.last_used_at[rows] + offset_s,
        states,
        answers,
    )
    return sessions, piece


def _answers(table: SessionTable, rows: NDArray[np.int64], record: Record, count: int) -> Answers:
    """The one-token answers of sessions that have `count` of them each."""
    answers: Answers = []
    first, base, credit = table.first_seq[rows], table.base_seq[rows], table.credit[rows]
    for turn in range(count):
        seqs = first + turn
        positions = (seqs - base) % credit
        prints, outputs = record.copies(rows, positions)
        answers.append((seqs, prints, 1, outputs))
    return answers


def _own_answers(table: SessionTable, row: int) -> Answers:
    """All answers of one session that keeps some beside the record."""
    session = table.sessions[row]
    if session is None:
        raise AssertionError("a row of nobody is to be written")
    answers: Answers = []
    oldest = session.answers.oldest_seq
    for seq in range(oldest, session.applied_seq + 1) if oldest else ():
        one = session.answers.get(seq)
        if one is not None:
            outputs = [array[np.newaxis] for array in one.outputs]
            answers.append((np.array([seq]), np.array([one.fingerprint], np.uint64), one.length, outputs))
    return answers
