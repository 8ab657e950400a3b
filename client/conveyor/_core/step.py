"""One step of one session, from its submission until it is answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from conveyor._core.answer import Answer
from conveyor._core.signature import Prepared, Signature
from conveyor._core.ticket import Ticket


@dataclass(slots=True, eq=False)
class Step:
    """A step that is not answered yet.

    Attributes:
        seq: its number.
        prepared: its inputs.
        timeout_ms: how long it may wait on the server; 0: the server's setting.
        ticket: its answer.
    """

    seq: int
    prepared: Prepared
    timeout_ms: int
    ticket: Ticket[Answer]


class Parcel(NamedTuple):
    """Steps of one session that may travel in one message.

    Attributes:
        signature: the session's model; sessions of one model version share one object.
        handle: the session's handle.
        acked_seq: the last step whose answer is here, and before all that are sent again.
        steps: one or more, of consecutive numbers and with one `timeout_ms`.
    """

    signature: Signature
    handle: int
    acked_seq: int
    steps: Sequence[Step]
