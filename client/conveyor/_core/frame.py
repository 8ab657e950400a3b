"""Columnar frames: many rows, each one step of one session, in packed buffers. Decoded by numpy, never row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from conveyor_proto.codec import WireError, decode_integers
from conveyor_proto.v1 import session_pb2 as pb
from numpy.typing import NDArray

from conveyor.errors import ProtocolError

Handles = NDArray[np.uint32]
Seqs = NDArray[np.uint64]
Lengths = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Answered rows.

    Attributes:
        handles: `[rows]` uint32.
        seqs: `[rows]` uint64.
        lengths: `[rows]` uint32, or None: one time step each.
        columns: per output, the rows' bytes one after the other.
        mine: which of the rows concern the member that is asked, as indices.
    """

    handles: Handles
    seqs: Seqs
    lengths: Lengths | None
    columns: Sequence[bytes]
    mine: NDArray[np.intp]


def decode_rows(message: pb.ResultFrame) -> Rows:
    """The rows of a frame.

    Raises:
        ProtocolError: the frame's vectors disagree.
    """
    try:
        handles = cast("Handles", decode_integers(message.handles, np.uint32, -1, "handles"))
        rows = len(handles)
        seqs = cast("Seqs", decode_integers(message.seqs, np.uint64, rows, "seqs"))
        lengths = None
        if message.lengths:
            lengths = cast("Lengths", decode_integers(message.lengths, np.uint32, rows, "lengths"))
    except WireError as error:
        raise ProtocolError(f"a result frame cannot be read: {error}") from error
    return Rows(handles, seqs, lengths, message.columns, np.arange(rows))
