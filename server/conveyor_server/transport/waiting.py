"""What came for sessions that a stream awaits from the store.

Invariant: what is about one handle is done in the order in which it came; what is about others waits only
behind a frame that is about both.
"""

import numpy as np
from conveyor_proto.v1 import session_pb2

# More is not kept for a client that does not wait for its SessionAttached.
_MOST = 4096


class Waiting:
    """Of one stream. Core thread only.

    Attributes:
        handles: whose sessions are awaited.
        requests: what came for them, and what came behind that for others in the same frames.
    """

    __slots__ = ("_behind", "handles", "requests")

    def __init__(self) -> None:
        self.handles: set[int] = set()
        self.requests: list[session_pb2.StreamRequest] = []
        # Handles of what waits.
        self._behind: set[int] = set()

    @property
    def full(self) -> bool:
        """Nothing more is kept."""
        return len(self.requests) >= _MOST

    def takes(self, request: session_pb2.StreamRequest) -> bool:
        """Keeps a request, where it is about a handle that is awaited, or comes behind one that is kept."""
        handles = handles_of(request)
        if handles.isdisjoint(self.handles) and handles.isdisjoint(self._behind):
            return False
        self.requests.append(request)
        self._behind |= handles
        return True

    def taken(self) -> list[session_pb2.StreamRequest]:
        """All that waits, in order; what still has to wait is to be given back."""
        requests, self.requests = self.requests, []
        self._behind = set()
        return requests


def handles_of(request: session_pb2.StreamRequest) -> set[int]:
    """The handles that a request is about."""
    kind = request.WhichOneof("kind")
    if kind == "frame":
        handles = request.frame.handles
        return set(np.frombuffer(handles[: len(handles) // 4 * 4], "<u4").tolist())
    return set() if kind is None else {getattr(request, kind).handle}
