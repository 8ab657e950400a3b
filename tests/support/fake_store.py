"""A store of sessions that several fake servers share, and which of them may write: see `fake_service`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb

if TYPE_CHECKING:
    from fake_service import FakeSession


@dataclass
class FakeRecord:
    """A session as it is in the store: what a server that takes it goes on from."""

    model: str
    durability: int
    credit: int
    epoch: int = 0
    seq: int = 0
    state: np.ndarray = field(default_factory=lambda: np.zeros(2, np.float32))
    answers: dict[int, list[bytes]] = field(default_factory=dict)
    contents: dict[int, list[bytes]] = field(default_factory=dict)
    # Of each step that is in the state, its inputs.
    history: list[list[bytes]] = field(default_factory=list)


class FakeStore:
    """All records.

    Attributes:
        away: it does not answer.
        writes: how many there were.
    """

    def __init__(self) -> None:
        self.records: dict[str, FakeRecord] = {}
        self.away = False
        self.writes = 0

    def put(self, session: "FakeSession") -> bool:
        """Writes what is not acknowledged, and the state. False: somebody else has taken the session, or closed it."""
        record = self.records.get(session.session_id)
        if record is None or record.epoch != session.epoch:
            return False
        if record.seq < session.applied:
            self.writes += 1
        record.seq, record.state = session.applied, session.state.copy()
        record.answers, record.contents = dict(session.answers), dict(session.contents)
        record.history = list(session.history)
        session.durable = session.applied
        return True

    def load(self, session: "FakeSession") -> None:
        """Puts a session back to where the store has it."""
        record = self.records[session.session_id]
        session.applied = session.durable = record.seq
        session.state = record.state.copy()
        session.answers, session.contents = dict(record.answers), dict(record.contents)
        session.history = list(record.history)
        session.failed_seq = None


DURABILITIES = {"none": pb.DURABILITY_NONE, "async": pb.DURABILITY_ASYNC, "sync": pb.DURABILITY_SYNC}
