"""What the core tells the transport. Events leave the core in the order in which they must reach the client."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.reasons import Fault
from numpy.typing import NDArray

from conveyor_server.sessions.flight import Flight, Offer
from conveyor_server.sessions.session import DetachCause, Session

_DETACHING, _LEAVING = 1, 2


@dataclass(slots=True, eq=False)
class Attachment:
    """A session held by a stream under a handle.

    Attributes:
        owner: the stream, opaque to the core.
        number: of the stream, never 0 and never used again.
        handle: chosen by the client, unique in the stream.
        session: what is held.
        epoch: of the session at this attach.
        marks: `detaching` and `leaving` as bits: there are as many of these as sessions.
    """

    owner: object
    number: int
    handle: int
    session: Session
    epoch: int
    marks: int = 0

    @property
    def detaching(self) -> bool:
        """It lets go once the accepted steps are answered."""
        return self.marks & _DETACHING != 0

    def detach(self) -> None:
        """It is `detaching` from now on."""
        self.marks |= _DETACHING

    @property
    def leaving(self) -> bool:
        """The owner's own: its client has let go, and nothing more is taken for it."""
        return self.marks & _LEAVING != 0

    def leave(self) -> None:
        """It is `leaving` from now on."""
        self.marks |= _LEAVING

    @property
    def live(self) -> bool:
        """Whether the session has not left the stream; else nothing about it may be sent there any more."""
        return self.session.attachment is self

    @property
    def outlet(self) -> object:
        """Where the owner's messages go, if it has such a thing."""
        return getattr(self.owner, "outlet", None)


@dataclass(slots=True)
class Answer:
    """A step is answered: with outputs, or with a fault.

    Attributes:
        reply_to: what the transport gave with the step.
        seq: the step's number.
        outputs: one for each of ModelSpec.outputs: `[time, *shape]`, or `[*shape]` without time. Empty with a fault.
        length: time steps of the step; 0 with a fault.
        fault: why nothing moved.
        replayed: answered from the record.
    """

    reply_to: object
    session: Session
    seq: int
    outputs: Sequence[Array] = ()
    length: int = 0
    fault: Fault | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Detached:
    """A session left its stream; the handle is free and no event about the attachment follows."""

    attachment: Attachment
    cause: DetachCause
    applied_seq: int


@dataclass(frozen=True, slots=True)
class Slept:
    """The state of a session that a stream holds is in the store alone: its next step has to wait for it.

    Attributes:
        attachment: the stream's hold on it.
        refused_seq: the first step that was refused and not sent again; 0: none. What comes behind it is aborted still
            when the session is back.
    """

    attachment: Attachment
    refused_seq: int


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that was asked to close is gone.

    Attributes:
        reply_to: what the transport gave with the request.
        applied_seq: the last step that it applied.
        fault: why it is gone from here, where that is not its end.
    """

    reply_to: object
    applied_seq: int
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Landed:
    """Members of a flight are applied; their sessions may already be on their next step.

    Attributes:
        flight: whose members, and where the answers go.
        members: int64 `[members]`.
        outputs: one for each of ModelSpec.outputs: `[members, time, *shape]`, or `[members, *shape]` without time.
            Valid until the engine's next run.
    """

    flight: Flight
    members: NDArray[np.int64]
    outputs: Sequence[Array]


@dataclass(frozen=True, slots=True)
class Declined:
    """Members of an offer are refused, and nothing moved."""

    offer: Offer
    members: NDArray[np.int64]
    fault: Fault


Event: TypeAlias = Answer | Detached | Slept | Closed | Landed | Declined
