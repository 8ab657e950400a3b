"""What goes up in one turn, in as few messages as may be: a message costs far more than a step.

Invariant: a session's steps leave in their order; the rows of a frame are of one model version and one `timeout_ms`.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.signature import Signature
from conveyor._core.step import Parcel, Step

# No server's limits on a message are met by the number of steps that are ready together; and the first of them run
# while the last travel.
MESSAGE_BYTES = 1 << 20
_MESSAGE_ROWS = 1 << 16


class _Rows:
    """Rows of one frame to be."""

    __slots__ = ("acked_seqs", "bytes", "handles", "steps")

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.acked_seqs: list[int] = []
        self.steps: list[Step] = []
        self.bytes = 0

    def takes(self, size: int) -> bool:
        return not self.steps or (self.bytes + size <= MESSAGE_BYTES and len(self.steps) < _MESSAGE_ROWS)

    def add(self, parcel: Parcel, step: Step, size: int) -> None:
        self.handles.append(parcel.handle)
        self.acked_seqs.append(parcel.acked_seq)
        self.steps.append(step)
        self.bytes += size

    def request(self) -> pb.StreamRequest:
        if len(self.steps) == 1:
            return _alone(self.handles[0], self.acked_seqs[0], self.steps[0])
        return self._frame()

    def _frame(self) -> pb.StreamRequest:
        request = pb.StreamRequest()
        message, steps = request.frame, self.steps
        message.handles = np.array(self.handles, "<u4").tobytes()
        message.seqs = np.array([step.seq for step in steps], "<u8").tobytes()
        lengths = [step.prepared.time_steps for step in steps]
        if max(lengths) > 1:
            message.lengths = np.array(lengths, "<u4").tobytes()
        message.columns.extend(map(b"".join, zip(*[step.prepared.data for step in steps], strict=True)))
        message.timeout_ms = steps[0].timeout_ms
        message.acked_seqs = np.array(self.acked_seqs, "<u8").tobytes()
        return request


def gather(parcels: Sequence[Parcel]) -> list[pb.StreamRequest]:
    """The messages that carry some parcels, at most one of each session: a frame for those that fit together.

    A step that is left alone travels as a Step, which is the cheapest and the fastest.
    """
    if len(parcels) == 1 and len(parcels[0].steps) == 1:
        (parcel,) = parcels
        return [_alone(parcel.handle, parcel.acked_seq, parcel.steps[0])]
    frames: dict[tuple[Signature, int], list[_Rows]] = {}
    for parcel in parcels:
        parts = frames.setdefault((parcel.signature, parcel.steps[0].timeout_ms), [_Rows()])
        for step in parcel.steps:
            size = sum(map(len, step.prepared.data))
            if not parts[-1].takes(size):
                parts.append(_Rows())
            parts[-1].add(parcel, step, size)
    return [rows.request() for parts in frames.values() for rows in parts]


def _alone(handle: int, acked_seq: int, step: Step) -> pb.StreamRequest:
    # Built in place: a message that is assigned to another is copied by way of its bytes.
    request = pb.StreamRequest()
    message = request.step
    message.handle = handle
    message.seq = step.seq
    for data in step.prepared.data:
        message.inputs.add().data = data
    message.timeout_ms = step.timeout_ms
    message.acked_seq = acked_seq
    return request
