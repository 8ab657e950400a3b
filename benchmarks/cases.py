"""What is measured: each case is one way to put load on one target, and a group holds what is compared.

Invariant: the cases of a group put the same load (same sessions, streams, connections, messages) on different targets,
or on the same target in different ways, and each round of a group runs all of them one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

LSTM = "bench-lstm"
GRU = "bench-gru16"
# One group has 16 streams, and no population is smaller.
MIN_SESSIONS = 16
# Batches at which bare onnxruntime runs beside messages; the time at others lies between.
_BATCHES = (1, 16, 64)
# Several batches take their part of a round each.
_BARE_SHARE = 0.5


class Target(StrEnum):
    """Who answers."""

    ECHO = "echo"
    NULL = "null"
    FULL = "full"
    CQ_ECHO = "cq-echo"
    AIO_ECHO = "aio-echo"
    BARE = "bare"


class Client(StrEnum):
    """Who asks: the loop itself (bare), the load generator with messages or frames, or the SDK."""

    NONE = "none"
    MESSAGES = "messages"
    FRAMES = "frames"
    POPULATION = "sdk-population"
    STEPS = "sdk-steps"
    PIPELINE = "sdk-pipeline"


# Targets of the server under test, and echoes, which run no model and so have nothing to do but to be asked.
SERVED = (Target.ECHO, Target.NULL, Target.FULL)
ECHOES = (Target.ECHO, Target.CQ_ECHO, Target.AIO_ECHO)
SDK = (Client.POPULATION, Client.STEPS, Client.PIPELINE)
_LABELS = {
    Target.ECHO: "Echo: the server's transport alone",
    Target.NULL: "Null: sessions and scheduler, no model",
    Target.FULL: "Full",
    Target.CQ_ECHO: "bare completion-queue echo",
    Target.AIO_ECHO: "bare grpc.aio echo",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report.

    Attributes:
        name: unique key, as in the JSON: GROUP/TARGET, and what else tells it from others of its group.
        label: what the table calls it.
        client: who asks.
        target: who answers.
        model: name of the model.
        sessions: sessions, spread evenly over the streams; of bare onnxruntime, the batch.
        streams: gRPC streams, spread evenly over the connections.
        connections: TCP connections.
        in_flight: steps of one session (so also frames of one stream) that are unanswered at once.
        share: of a segment's length.
    """

    name: str
    label: str
    client: Client
    target: Target
    model: str
    sessions: int
    streams: int = 1
    connections: int = 1
    in_flight: int = 1
    share: float = 1.0

    @property
    def frames(self) -> bool:
        """One request carries a step of each of the stream's sessions."""
        return self.client in {Client.FRAMES, Client.POPULATION}


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that a round runs one after the other.

    Attributes:
        name: unique key.
        label: what the tables and the plots call it.
        cases: in the order in which they run.
    """

    name: str
    label: str
    cases: tuple[Case, ...]

    def case(self, target: Target) -> Case | None:
        """The first case of a target."""
        return next((case for case in self.cases if case.target is target), None)


def groups(sessions: int = 256, transport: str = "cq", *, main: bool = False) -> list[Group]:
    """All groups.

    Args:
        sessions: the largest population, MIN_SESSIONS at least.
        transport: of the server under test; the bare echo of the other kind is left out beside aio.
        main: only those that a comparison of two transports needs.
    """
    echoes = [Target.CQ_ECHO, Target.AIO_ECHO] if transport == "cq" else [Target.AIO_ECHO]
    found = [_loads(form, echoes) for form in _forms(sessions)] + [_pipeline(), _curve(sessions)]
    return [group for group in found if not main or group.name in _MAIN]


def choose(found: Sequence[Group], patterns: Sequence[str]) -> list[Group]:
    """The groups whose names match a shell pattern; no patterns: all."""
    return [group for group in found if not patterns or any(fnmatchcase(group.name, item) for item in patterns)]


_MAIN = {"frames-1", "stream-1", "streams", "connections"}


def _forms(n: int) -> list[Case]:
    """The loads, as cases of Full with a group's name and label."""
    few = min(8, n)
    forms = [
        ("frames-1", f"frames of {n} sessions, ping-pong", Client.FRAMES, LSTM, n, 1, 1, 1),
        ("frames-2", f"frames of {n} sessions, 2 in flight", Client.FRAMES, LSTM, n, 1, 1, 2),
        ("gru-frames-1", f"frames of {n} sessions, ping-pong, GRU 16", Client.FRAMES, GRU, n, 1, 1, 1),
        ("gru-frames-2", f"frames of {n} sessions, 2 in flight, GRU 16", Client.FRAMES, GRU, n, 1, 1, 2),
        ("sdk-population", f"SDK, population of {n} sessions", Client.POPULATION, LSTM, n, 1, 1, 1),
        ("stream-1", "1 stream", Client.MESSAGES, LSTM, 1, 1, 1, 1),
        ("streams-16", "16 streams on 2 connections", Client.MESSAGES, LSTM, 16, 16, 2, 1),
        ("streams", f"{n} streams on {few} connections", Client.MESSAGES, LSTM, n, n, few, 1),
        ("connections", f"{n} streams on {n} connections", Client.MESSAGES, LSTM, n, n, n, 1),
        ("one-stream", f"{n} sessions on 1 stream", Client.MESSAGES, LSTM, n, 1, 1, 1),
    ]
    return [
        Case(name, label, client, Target.FULL, model, sessions, streams, connections, in_flight)
        for name, label, client, model, sessions, streams, connections, in_flight in forms
    ]


def _loads(form: Case, echoes: Sequence[Target]) -> Group:
    """A load on all targets that can answer it."""
    served = (Target.FULL,) if form.client in SDK else SERVED
    targets = [*served, *([] if form.client in SDK else echoes)]
    cases = [_on(form, target) for target in targets]
    batches = [form.sessions] if form.frames else sorted({*_BATCHES, form.sessions})
    batches = [batch for batch in batches if batch <= form.sessions]
    cases += [_bare(form, batch, _BARE_SHARE if len(batches) > 1 else 1.0) for batch in batches]
    return Group(form.name, form.label, tuple(cases))


def _on(form: Case, target: Target) -> Case:
    return replace(form, name=f"{form.name}/{target}", label=_LABELS[target], target=target)


def _bare(form: Case, batch: int, share: float) -> Case:
    name, label = f"{form.name}/{Target.BARE}-{batch}", f"bare onnxruntime, batch {batch}"
    return Case(name, label, Client.NONE, Target.BARE, form.model, batch, share=share)


def _pipeline() -> Group:
    """The SDK on one session: each step after the answer to the last, and several on their way."""
    name = "sdk-session"
    clients = {Client.STEPS: "s.step(x), ping-pong", Client.PIPELINE: "s.stream(xs), pipelined"}
    cases = [Case(f"{name}/{client}", label, client, Target.FULL, LSTM, 1) for client, label in clients.items()]
    return Group(name, "SDK, one session, one token a step", tuple(cases))


def _curve(n: int) -> Group:
    """Full over the number of streams, on up to 8 connections."""
    counts = [count for count in (2**power for power in range(11)) if count <= 4 * n]
    cases = [
        Case(
            f"curve/{m}",
            "1 stream" if m == 1 else f"{m} streams",
            Client.MESSAGES,
            Target.FULL,
            LSTM,
            m,
            streams=m,
            connections=min(8, m),
        )
        for m in counts
    ]
    return Group("curve", "one token per message over the number of streams, on up to 8 connections", tuple(cases))
