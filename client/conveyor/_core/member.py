"""What lives on a stream: a session, or a population of them. The stream dispatches by handle and knows no more."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.frame import Frame, Handles, Seqs
from conveyor._core.step import Parcel
from conveyor._core.ticket import Ticket
from conveyor.errors import ConveyorError


class Leaving(Enum):
    """How the client lets go of a session."""

    DETACH = auto()
    CLOSE = auto()


class Stepper(Protocol):
    """Who has steps to send, that may travel with those of others."""

    def take(self) -> Parcel | None:
        """What goes in the next message; from now on it counts as sent."""


class Outlet(Protocol):
    """Takes what a member has to send."""

    def send(self, request: pb.StreamRequest) -> None:
        """Sends a message, behind all that were sent before."""

    def offer(self, stepper: Stepper) -> None:
        """Asks for steps when a message can be written: by then there may be more of them."""

    def postpone(self, handle: int, error: ConveyorError) -> None:
        """Has a member `retry` what a handle was refused, after a while; or `give_up`, once that took too long."""


class Member(Protocol):
    """A holder of handles. Every method runs under the link's lock and only moves plain data.

    Attributes:
        opened: settled by its first attach.
        left: settled once it has let go of its handles, as `leave` asked.
    """

    opened: Ticket[pb.SessionInfo]
    left: Ticket[None]

    @property
    def handles(self) -> range:
        """The handles that it holds."""

    @property
    def busy(self) -> bool:
        """Somebody waits for an answer, so that a lost stream must be opened again."""

    @property
    def unanswered(self) -> bool:
        """Steps were sent and not answered."""

    @property
    def unstored(self) -> bool:
        """Steps were submitted that the server's store shall have and does not have yet."""

    @property
    def gone(self) -> bool:
        """Nothing is left to do on any stream."""

    def attach(self) -> None:
        """A new stream is open: send what attaches to it."""

    def attached(self, message: pb.SessionAttached) -> None:
        """An attach was granted: send what was unanswered."""

    def result(self, message: pb.StepResult) -> None:
        """A step was answered."""

    def owns(self, frame: Frame) -> bool:
        """Every row of the frame is of a handle of this member."""

    def rows(self, frame: Frame, rows: Sequence[int] | None) -> None:
        """Rows of a frame were answered: these, or all of them."""

    def stored(self, handles: Handles, seqs: Seqs) -> None:
        """Its sessions' states up to these steps are in the server's store."""

    def failed(self, handle: int, seq: int, error: ConveyorError) -> bool:
        """A step (or, at seq 0, an attach, detach or close) was refused. True: only another stream can help."""

    def detached(self, message: pb.SessionDetached) -> None:
        """The server let go of a handle."""

    def retry(self, handles: Sequence[int]) -> None:
        """Asks again for what these were refused for now."""

    def give_up(self, handle: int, error: ConveyorError) -> None:
        """A handle was refused for too long: fail whoever waits for it."""

    def move(self, resume_token: str) -> None:
        """The server goes away: the next one is to be shown this."""

    def hold(self) -> None:
        """The stream takes nothing new from here on; answers to what was sent still come."""

    def suspend(self) -> None:
        """The stream is gone."""

    def leave(self, how: Leaving) -> Ticket[None]:
        """Detaches from, or closes, its sessions once their steps are answered and, to detach, stored."""

    def abandon(self, error: ConveyorError) -> None:
        """No stream came back in time: fail whoever waits."""

    def end(self, error: ConveyorError) -> None:
        """Nothing more shall be asked of it: fail whoever waits, and every later call."""
