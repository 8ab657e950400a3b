"""One step's answer, the same whether it came alone or as a row of a frame."""

from collections.abc import Sequence
from typing import NamedTuple

from conveyor_proto.v1 import session_pb2 as pb

Buffer = bytes | memoryview


class Answer(NamedTuple):
    """What the model said to one step.

    Attributes:
        outputs: one per model output, its bytes: `[time, *shape]`, or `[*shape]` for an output without time.
        replayed: the step was applied earlier, and is answered from the server's record.
    """

    outputs: Sequence[Buffer]
    replayed: bool


def answer_of(message: pb.StepResult) -> Answer:
    """The answer in a message of its own."""
    return Answer([tensor.data for tensor in message.outputs], message.replayed)
