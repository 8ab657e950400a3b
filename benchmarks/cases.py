"""What is measured: each case is one way to put load on one target.

Invariant: a case of Conveyor's has a twin for the echo (same messages, same loop) and one for bare onnxruntime (same
number of sessions in a batch), so that every ratio is between two numbers of the same round.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

MODEL = "bench-lstm"
INPUT_SIZE = 64
HIDDEN_SIZE = 256
OUTPUT_SIZE = 64
# One case has 16 streams, and no population is smaller.
MIN_SESSIONS = 16
# What one token weighs in a message, in and out: float32 values.
TOKEN_BYTES = 4 * INPUT_SIZE
REPLY_BYTES = 4 * OUTPUT_SIZE


class Target(StrEnum):
    """Who answers."""

    BARE = "onnxruntime"
    CONVEYOR = "conveyor"
    ECHO = "echo"


class Client(StrEnum):
    """Who asks: the loop itself (bare), messages or frames over the generated stubs, or the SDK."""

    NONE = "none"
    MESSAGES = "messages"
    FRAMES = "frames"
    SDK = "sdk"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report.

    Attributes:
        name: unique key, as in the JSON.
        label: what the table and the plots call it.
        client: who asks.
        sessions: sessions, spread evenly over the streams; of bare onnxruntime, the batch.
        streams: gRPC streams, spread evenly over the connections.
        connections: TCP connections.
        in_flight: steps of one session (so also frames of one stream) that are unanswered at once.
        target: who answers.
        bare: the case of bare onnxruntime to compare with, or empty.
        echo: the case of the echo to compare with, or empty.
    """

    name: str
    label: str
    client: Client
    sessions: int
    streams: int = 1
    connections: int = 1
    in_flight: int = 1
    target: Target = Target.CONVEYOR
    bare: str = ""
    echo: str = ""


def cases(sessions: int = 256) -> list[Case]:
    """All cases in the order in which a round runs them: what is compared is measured one after the other.

    Args:
        sessions: the largest population, MIN_SESSIONS at least.
    """
    found = [
        Case(f"bare-{batch}", f"batch {batch}", Client.NONE, batch, target=Target.BARE)
        for batch in sorted({1, MIN_SESSIONS, sessions})
    ]
    for case in _loads(sessions):
        found.append(replace(case, bare=f"bare-{case.sessions}", echo=f"echo-{case.name}"))
        if case.client is Client.SDK:
            found[-1] = replace(found[-1], echo="echo-frames-1")
        else:
            found.append(replace(case, name=f"echo-{case.name}", target=Target.ECHO))
    return found


def _loads(sessions: int) -> list[Case]:
    few = min(8, sessions)
    frames, messages, n = Client.FRAMES, Client.MESSAGES, sessions
    return [
        Case("frames-1", f"frames of {sessions} sessions, ping-pong", frames, sessions),
        Case("frames-2", f"frames of {sessions} sessions, 2 in flight", frames, sessions, in_flight=2),
        Case("sdk", f"SDK, population of {sessions} sessions", Client.SDK, sessions),
        Case("stream-1", "1 stream", messages, 1),
        Case("streams-16", "16 streams on 2 connections", messages, 16, streams=16, connections=2),
        Case("streams", f"{n} streams on {few} connections", messages, n, streams=n, connections=few),
        Case("connections", f"{n} streams on {n} connections", messages, n, streams=n, connections=n),
        Case("one-stream", f"{sessions} sessions on 1 stream", messages, sessions),
    ]
