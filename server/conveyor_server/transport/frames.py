"""A StepFrame's rows: whose they are, and what is in them.

Invariant: where handles and seqs can be read, there is something to say about every row.
"""

from collections.abc import Collection, Iterable

import numpy as np
from conveyor_proto.codec import WireError, decode_integers
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.inputs import StepInputs, decode_frame

# A frame names each handle once, so more rows than this are a mistake, and would be answered one by one.
MAX_ROWS = 65_536


def numbers(frame: session_pb2.StepFrame) -> tuple[list[int], list[int]]:
    """The frame's handles and seqs.

    Raises:
        WireError: FRAME_INVALID, where they cannot be read or are none or too many.
    """
    handles = decode_integers(frame.handles, np.uint32, -1, "handles")
    seqs = decode_integers(frame.seqs, np.uint64, len(handles), "seqs")
    if not 0 < len(handles) <= MAX_ROWS:
        raise WireError(_invalid(f"the frame has {len(handles)} rows: send 1 to {MAX_ROWS}"))
    return handles.tolist(), seqs.tolist()


def contents(
    frame: session_pb2.StepFrame, rows: int, engines: Collection[Engine], max_time_steps: int
) -> Iterable[tuple[StepInputs | Fault, int]]:
    """Content and acked_seq of each row; all alike where the frame is refused as a whole.

    Args:
        frame: as it came.
        rows: how many it has.
        engines: of its attached sessions.
        max_time_steps: of one row.
    """
    if len(engines) != 1:
        names = ", ".join(sorted(f"{engine.model} version {engine.version}" for engine in engines))
        text = f"the frame's sessions are of {names or 'no model'}: send a frame for each model version"
        return [(_invalid(text), 0)] * rows
    (engine,) = engines
    try:
        decoded = decode_frame(frame, engine.spec, max_time_steps=max_time_steps)
    except WireError as error:
        return [(error.fault, 0)] * rows
    return zip(decoded.rows, decoded.acked_seqs, strict=True)


def _invalid(text: str) -> Fault:
    return Fault(e.ERROR_REASON_FRAME_INVALID, text, {"field": "handles"})
