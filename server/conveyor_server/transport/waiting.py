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
    """

    __slots__ = ("_behind", "_requests", "handles")

    def __init__(self) -> None:
        self.handles: set[int] = set()
        # What came for them, and what came behind that for others in the same frames; each with those of its handles
        # that are awaited still.
        self._requests: list[tuple[session_pb2.StreamRequest, set[int]]] = []
        # Handles of what waits.
        self._behind: set[int] = set()

    def __bool__(self) -> bool:
        """Something waits."""
        return bool(self._requests)

    @property
    def full(self) -> bool:
        """Nothing more is kept."""
        return len(self._requests) >= _MOST

    def concerns(self, request: session_pb2.StreamRequest) -> bool:
        """A request is about a handle that is awaited, or comes behind one that is kept."""
        handles = handles_of(request)
        return not (handles.isdisjoint(self.handles) and handles.isdisjoint(self._behind))

    def add(self, request: session_pb2.StreamRequest) -> None:
        """Keeps a request."""
        handles = handles_of(request)
        self._requests.append((request, handles & self.handles))
        self._behind |= handles

    def arrived(self, handle: int) -> bool:
        """A handle is awaited no more; returns whether something that waits can be done now."""
        self.handles.discard(handle)
        free = False
        for _, missing in self._requests:
            if handle in missing:
                missing.remove(handle)
                free = free or not missing
        return free

    def taken(self) -> list[session_pb2.StreamRequest]:
        """All that waits, in order; what still has to wait is to be given back."""
        requests, self._requests = self._requests, []
        self._behind = set()
        return [request for request, _ in requests]


def handles_of(request: session_pb2.StreamRequest) -> set[int]:
    """The handles that a request is about."""
    kind = request.WhichOneof("kind")
    if kind == "frame":
        handles = request.frame.handles
        return set(np.frombuffer(handles[: len(handles) // 4 * 4], "<u4").tolist())
    return set() if kind is None else {getattr(request, kind).handle}


def steps_of(request: session_pb2.StreamRequest) -> list[tuple[int, int]]:
    """Handle and seq of the steps that a request holds; of another request, its handle and 0."""
    kind = request.WhichOneof("kind")
    if kind == "frame":
        frame = request.frame
        rows = min(len(frame.handles) // 4, len(frame.seqs) // 8)
        handles, seqs = np.frombuffer(frame.handles, "<u4", rows), np.frombuffer(frame.seqs, "<u8", rows)
        return list(zip(handles.tolist(), seqs.tolist(), strict=True))
    return [] if kind is None else [(getattr(request, kind).handle, request.step.seq if kind == "step" else 0)]
