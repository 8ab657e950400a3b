"""A session moves to another version of its model, between two steps.

Invariant: it moves with its state, bit for bit, and with the answers that it keeps; whoever holds it notices nothing.
"""

from collections.abc import Sequence
from typing import TypeAlias

from conveyor_proto.v1 import spec_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.sessions.record import Record
from conveyor_server.sessions.session import Session

_Tensor: TypeAlias = spec_pb2.TensorSpec | spec_pb2.StateSpec


def difference(one: spec_pb2.ModelSpec, other: spec_pb2.ModelSpec) -> str:
    """Why sessions of one model cannot go on with another; "": they can."""
    pairs: Sequence[tuple[str, Sequence[_Tensor], Sequence[_Tensor]]] = (
        ("inputs", one.inputs, other.inputs),
        ("outputs", one.outputs, other.outputs),
        ("states", one.states, other.states),
    )
    for what, mine, theirs in pairs:
        if list(map(_form, mine)) != list(map(_form, theirs)):
            return what
    return ""


def move(session: Session, target: Engine, record: Record) -> None:
    """Makes it a session of another engine, with that engine's record. None of its steps is in its engine."""
    for pending in session.pending:
        session.engine.backlog.remove(pending.step.length)
        target.backlog.add(pending.step.length)
    states = session.engine.read(session.lane)
    answers = [session.record.get(session.row, seq) for seq in session.record.seqs(session.row)]
    session.engine.free(session.lane)
    session.engine, session.record = target, record
    session.table.record[session.row] = record.number
    if states is not None:
        target.write(session.lane, states)
    for pending in session.pending:
        pending.step.lane = session.lane
    # Those in the ring are the session's own, and stay.
    session.table.forget_answers(session.row)
    for answer in answers:
        if answer is not None:
            record.add_one(session.row, answer)


def _form(item: _Tensor) -> tuple[object, ...]:
    timed = item.has_time if isinstance(item, spec_pb2.TensorSpec) else False
    return item.name, item.dtype, tuple(item.shape), timed
