"""The record of a session's last answers, so that a step sent again is answered and not applied again.

Invariant: seqs are consecutive and end with the session's applied_seq; there are never more than `limit`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from conveyor_proto.codec import Array


@dataclass(slots=True)
class Recorded:
    """One applied step: its number, what was in it, and what came out."""

    seq: int
    fingerprint: int
    length: int
    outputs: Sequence[Array]


class Answers:
    """A bounded ring of Recorded. Core thread only.

    Args:
        limit: how many are kept. At least the session's credit, or a client that resumes could miss one.
    """

    __slots__ = ("_ring",)

    def __init__(self, limit: int) -> None:
        self._ring: deque[Recorded] = deque(maxlen=limit)

    @property
    def oldest_seq(self) -> int:
        """The oldest seq that can be replayed; 0: none."""
        return self._ring[0].seq if self._ring else 0

    def add(self, answer: Recorded) -> None:
        """Records the answer of the next seq; the oldest makes room."""
        self._ring.append(answer)

    def get(self, seq: int) -> Recorded | None:
        """The answer of `seq`, or None when it is no longer kept."""
        ring = self._ring
        if not ring:
            return None
        index = seq - ring[0].seq
        return ring[index] if 0 <= index < len(ring) else None

    def forget(self, acked_seq: int) -> None:
        """Drops answers that the client says it holds."""
        ring = self._ring
        while ring and ring[0].seq <= acked_seq:
            ring.popleft()
