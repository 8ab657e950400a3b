"""One session: its place in an engine, its numbering and what it has accepted.

Invariants: accepted_seq == applied_seq + len(pending); only pending[0] is in the engine; failed_seq is 0 or the next
seq that can be accepted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.engine.step import Lane, Step
from conveyor_server.sessions.answers import Answers

DetachCause: TypeAlias = session_pb2.DetachCause.ValueType

if TYPE_CHECKING:
    from conveyor_server.sessions.events import Attachment


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session was granted.

    Attributes:
        max_in_flight: credit: steps that may be unanswered at once.
        idle_timeout_s: without a step, attach or detach for this long, the session is closed.
    """

    max_in_flight: int
    idle_timeout_s: float


@dataclass(slots=True)
class Submission:
    """A step as it arrived, decoded.

    Attributes:
        seq: the client's number.
        reply_to: opaque; comes back in the Answer.
        inputs: one for each of ModelSpec.inputs: `[time, *shape]`, or `[*shape]` without time.
        length: time steps, at least 1.
        fingerprint: of the content; equal content has equal fingerprints.
        fault: why the content cannot be used; the other three are then unset.
        epoch: 0, or the epoch that the sender believes it holds.
        timeout_s: how long it may wait before it begins.
        acked_seq: answers up to here are held by the client.
    """

    seq: int
    reply_to: object
    inputs: Sequence[Array] = ()
    length: int = 0
    fingerprint: int = 0
    fault: Fault | None = None
    epoch: int = 0
    timeout_s: float = math.inf
    acked_seq: int = 0


@dataclass(slots=True, eq=False)
class Pending:
    """An accepted step that is not answered yet.

    Attributes:
        waiters: every `reply_to` that gets the answer, the first sender first.
    """

    seq: int
    fingerprint: int
    step: Step
    waiters: list[object]


@dataclass(slots=True, eq=False)
class Session:
    """A session's record. Core thread only.

    Attributes:
        created_at, last_used_at: seconds of the driver's clock.
        attachment: the stream that holds it.
        closing: why it goes once the accepted steps are answered; no further step is accepted.
        close_waiters: `reply_to` of those who asked for it.
    """

    id: str
    engine: Engine
    options: SessionOptions
    answers: Answers
    created_at: float
    last_used_at: float
    lane: Lane = field(default_factory=Lane)
    epoch: int = 0
    applied_seq: int = 0
    applied_time_steps: int = 0
    failed_seq: int = 0
    pending: deque[Pending] = field(default_factory=deque)
    attachment: Attachment | None = None
    closing: DetachCause | None = None
    close_waiters: list[object] = field(default_factory=list)

    @property
    def accepted_seq(self) -> int:
        """The last seq that was accepted."""
        return self.applied_seq + len(self.pending)
