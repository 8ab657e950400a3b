"""The record of answers, for many sessions at once and for one; and when a session of the table is idle."""

from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_server.sessions.record import Record, Recorded
from conveyor_server.sessions.table import SessionTable
from hypothesis import given

from tests.unit.core.conftest import sum_spec

CREDITS = (1, 2, 3, 5)


@pytest.fixture
def record():
    return make_record()


def make_record():
    table = SessionTable(8)
    for row, credit in enumerate(CREDITS):
        table.credit[row] = credit
        table.forget_answers(row)
    return Record(1, sum_spec().outputs, table)


def add(record, rows, seqs, *, at=None):
    """Records answers that can be told apart; `at` gives the rows as a slice."""
    rows, seqs = np.array(rows), np.array(seqs)
    totals = (rows * 1000.0 + seqs)[:, None, None]
    where = rows if at is None else at
    cells = record.table.look(where)
    record.add(where, cells, seqs, (seqs * 7).astype(np.uint64), [totals, -totals[:, 0]])
    record.table.put(where, cells)
    record.table.applied_seq[rows] = seqs


def acknowledge(record, rows, seqs):
    rows = np.array(rows)
    cells = record.table.look(rows)
    record.acknowledge(cells, np.array(seqs))
    record.table.put(rows, cells)


def held(record, row, seqs=range(1, 60)):
    got = [record.get(row, seq) for seq in seqs]
    for answer in filter(None, got):
        assert (answer.fingerprint, answer.length) == (answer.seq * 7, 1)
        assert [array.shape for array in answer.outputs] == [(1, 1), (1,)]
        assert answer.outputs[0][0, 0] == row * 1000.0 + answer.seq == -answer.outputs[1][0]
    return [answer.seq for answer in got if answer is not None]


def test_each_session_keeps_as_many_as_its_credit(record):
    for seq in range(1, 12):
        add(record, [0, 1, 2, 3], [seq] * 4)
    assert [held(record, row) for row in range(4)] == [[11], [10, 11], [9, 10, 11], [7, 8, 9, 10, 11]]
    assert len(record._planes) == 5


def test_what_is_acknowledged_is_gone_and_costs_one_plane(record):
    for seq in range(1, 12):
        acknowledge(record, range(4), [seq - 1] * 4)
        add(record, [0, 1, 2, 3], [seq] * 4, at=slice(0, 4))
        assert [held(record, row) for row in range(4)] == [[seq]] * 4
    assert len(record._planes) == 1


def test_acknowledging_the_future_loses_nothing(record):
    add(record, [3], [1])
    acknowledge(record, [3], [99])
    assert held(record, 3) == []
    add(record, [3], [2])
    record.acknowledge_one(3, 1)
    acknowledge(record, [3], [0])
    assert held(record, 3) == [2]


def test_an_answer_that_does_not_follow_begins_anew(record):
    for seq in (1, 2, 3):
        add(record, [3], [seq])
    add(record, [3], [40])
    add(record, [3], [41])
    assert held(record, 3) == [40, 41]


def test_what_is_given_out_does_not_change_under_the_hand(record):
    add(record, [1], [1])
    answer = record.get(1, 1)
    add(record, [1], [2])
    add(record, [1], [3])
    assert answer.outputs[0][0, 0] == 1001.0


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
            st.sampled_from(["many", "slice", "one"]),
            st.integers(0, 6),
        ),
        max_size=40,
    )
)
def test_it_is_a_ring_for_each_session_however_answers_come(history):
    record = make_record()
    rings = [deque(maxlen=credit) for credit in CREDITS]
    seqs = [0] * 4
    for chosen, way, back in history:
        rows = range(min(chosen), max(chosen) + 1) if way == "slice" else chosen
        # Some of them acknowledge first, as far back as they like.
        acked = {row: max(0, seqs[row] - back) for row in rows}
        if way == "one":
            for row in rows:
                record.acknowledge_one(row, acked[row])
        else:
            acknowledge(record, rows, list(acked.values()))
        for row in rows:
            seqs[row] += 1
            while rings[row] and rings[row][0] <= acked[row]:
                rings[row].popleft()
            rings[row].append(seqs[row])
        if way == "one":
            for row in rows:
                total = row * 1000.0 + seqs[row]
                outputs = [np.array([[total]]), np.array([-total])]
                record.add_one(row, Recorded(seqs[row], seqs[row] * 7, 1, outputs))
                record.table.applied_seq[row] = seqs[row]
        else:
            where = slice(rows[0], rows[-1] + 1) if way == "slice" else None
            add(record, list(rows), [seqs[row] for row in rows], at=where)
        for row in range(4):
            assert held(record, row) == list(rings[row])


# ---------------------------------------------------------------- answers of a session: tokens and chunks


@pytest.mark.parametrize("lengths", [(1, 3, 1, 1), (3, 1, 3, 1), (1, 1, 2, 2), (4, 4, 1, 4), (2, 1, 1, 1)])
def test_tokens_and_chunks_are_kept_in_one_order(make_core, lengths):
    core = make_core(max_sessions=4)
    session = core.create(max_in_flight=3)
    first = {}
    for seq, length in enumerate(lengths, 1):
        tag = core.send(session, seq, *[0.25 * seq] * length)
        first[seq] = core.steps_told()[tag, seq]
    assert session.answers.oldest_seq == 2
    for seq, length in enumerate(lengths, 1):
        tag = core.send(session, seq, *[0.25 * seq] * length)
        again = core.steps_told()[tag, seq]
        if seq == 1:
            assert again.reason == "STEP_ANSWER_EVICTED"
        else:
            assert (again.outputs, again.length, again.replayed) == (first[seq].outputs, length, True)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "offered"])
def test_chunks_that_are_acknowledged_are_let_go(make_core, together):
    core = make_core(max_sessions=4)
    session = core.hold(core.create(max_in_flight=3))
    core.offer(*core.items([session], 1.0, 1.0))
    core.settle()
    assert (session.answers.oldest_seq, len(session.ring)) == (1, 1)
    if together:
        (item,) = core.items([session], 1.0)
        core.offer(item.__class__(**{**item.__dict__, "acked_seq": 1}), acked=True)
    else:
        core.send(session, 2, 1.0, acked_seq=1)
    core.settle()
    assert (session.answers.oldest_seq, len(session.ring)) == (2, 0)


# ---------------------------------------------------------------- idle


def test_idle_rows_and_when_the_next_one_is():
    table = SessionTable(6)
    table.idle_timeout_s[:4] = [1.0, 5.0, 2.0, 100.0]
    table.last_used_at[:4] = [10.0, 10.0, 3.0, 0.0]
    rows, next_at = table.idle(11.0)
    assert (rows.tolist(), next_at) == ([0, 2], 15.0)
    rows, next_at = table.idle(9.0)
    assert (rows.tolist(), next_at) == ([2], 11.0)


def test_an_empty_table_is_never_idle():
    rows, next_at = SessionTable(3).idle(1e9)
    assert (rows.tolist(), next_at) == ([], np.inf)
