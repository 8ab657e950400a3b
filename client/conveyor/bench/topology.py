"""Which session is on which stream, and which stream on which connection.

Invariant: sessions, streams and connections are numbered so that each stream's sessions and each connection's streams
follow one another. Sessions in ascending order are therefore in the order of streams and of connections too.
"""

from dataclasses import dataclass

import numpy as np

from conveyor.bench.ledger import Integers
from conveyor.bench.spec import LoadSpec


@dataclass(frozen=True, slots=True)
class Topology:
    """Numbers of sessions, streams and connections.

    Attributes:
        first_session: of each stream, and the number of sessions, `[streams + 1]`.
        first_stream: of each connection, and the number of streams, `[connections + 1]`.
        stream: of each session, `[sessions]`.
        connection: of each session, `[sessions]`.
        handle: of each session on its stream, from 1, `[sessions]`.
    """

    first_session: Integers
    first_stream: Integers
    stream: Integers
    connection: Integers
    handle: Integers

    @classmethod
    def of(cls, spec: LoadSpec) -> "Topology":
        """Spreads evenly."""
        first_session, first_stream = _spread(spec.sessions, spec.streams), _spread(spec.streams, spec.connections)
        sessions = np.arange(spec.sessions)
        stream = np.repeat(np.arange(spec.streams), np.diff(first_session))
        connection = np.repeat(np.arange(spec.connections), np.diff(first_stream))[stream]
        return cls(first_session, first_stream, stream, connection, sessions - first_session[stream] + 1)

    def sessions(self, stream: int) -> range:
        """The sessions of a stream."""
        return range(int(self.first_session[stream]), int(self.first_session[stream + 1]))

    def streams(self, connection: int) -> range:
        """The streams of a connection."""
        return range(int(self.first_stream[connection]), int(self.first_stream[connection + 1]))

    def session(self, stream: int, handle: int) -> int:
        """The session under a handle."""
        return int(self.first_session[stream]) + handle - 1


def _spread(count: int, over: int) -> Integers:
    """Where each of `over` shares begins, as even as can be, and the end: `[over + 1]`."""
    return np.arange(over + 1) * count // over
