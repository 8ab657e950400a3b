"""What load is wanted, and how it can fail."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from conveyor.errors import ConveyorError

# CPU seconds that the client needs, roughly: to look at the network, and for one step; and cores that it may take.
_LOOK_S = 100e-6
_STEP_S = 6e-6
_FEW_CORES, _MANY_CORES = 0.3, 0.5
# Of a closed loop: a server answers one step in tens of microseconds, so this is some hundredths of the time for all.
_MANY_STEPS = 64
_TICK_PER_STEP_S = 1e-6
_LONGEST_TICK_S = 0.5e-3


class LoadError(ConveyorError):
    """The load cannot be put on, or the server did something that the protocol does not allow."""


class Pattern(StrEnum):
    """When steps are sent."""

    CLOSED = "closed"
    POISSON = "poisson"
    BURST = "burst"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """The load of one process.

    Attributes:
        model: name of the model.
        version: empty: the latest.
        sessions: sessions, spread evenly over the streams.
        streams: gRPC streams, spread evenly over the connections.
        connections: TCP connections.
        pattern: closed: a session (in frames: a stream) sends as soon as it has an answer. poisson: steps fall due at
            random, at `rate_per_s`, whatever the server does. burst: `rate_per_s * burst_s` steps fall due at once.
        rate_per_s: steps per second that fall due, over all sessions; of no meaning to a closed loop.
        burst_s: time between two bursts.
        frames: steps travel in StepFrames, one for each stream and turn, not in a message each.
        in_flight: steps of one session that are unanswered at most.
        shed: a step that falls due in an open loop while its session has `in_flight` unanswered is given up at once, as
            an app does that wants no late answers; else it waits here until its session has room.
        time_steps: of each step.
        echo: ask the server's transport alone (metadata `conveyor-diagnostics: echo`); needs `--diagnostics` there.
        opening: attaches that are unanswered at most while the load is opened.
        answer_timeout_s: silence of the server after which the load gives up.
        tick_s: least time between two looks at the network, so that many answers share one; None: as `tick` says.
        root_certificates: encrypt, and trust the authorities in this PEM file; None: no TLS.
        token_file: file of the bearer token to show; None: none.
        integers_below: inputs of whole numbers, such as token ids, are drawn from 0 to one less.
        seed: of inputs and arrivals.
    """

    model: str
    version: str = ""
    sessions: int = 1
    streams: int = 1
    connections: int = 1
    pattern: Pattern = Pattern.CLOSED
    rate_per_s: float = 0.0
    burst_s: float = 0.1
    frames: bool = False
    in_flight: int = 1
    shed: bool = False
    time_steps: int = 1
    echo: bool = False
    opening: int = 64
    answer_timeout_s: float = 30.0
    tick_s: float | None = None
    root_certificates: Path | None = None
    token_file: Path | None = None
    integers_below: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where the numbers do not fit together."""
        if not 1 <= self.connections <= self.streams <= self.sessions:
            raise ValueError(
                f"{self.sessions} sessions on {self.streams} streams on {self.connections} connections: at least one "
                "session is needed for each stream, and one stream for each connection"
            )
        for name in ("in_flight", "time_steps", "opening", "integers_below"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, not {getattr(self, name)}")
        if self.pattern is not Pattern.CLOSED and not self.rate_per_s > 0:
            raise ValueError(f"pattern {self.pattern} needs a rate of steps per second")
        if self.shed and self.pattern is Pattern.CLOSED:
            raise ValueError("shed is for steps that fall due: a closed loop has none to give up, see pattern")
        if not self.burst_s > 0:
            raise ValueError(f"burst_s is a number of seconds above 0, not {self.burst_s}")

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What is sent ahead of every call.

        Raises:
            LoadError: the token cannot be read.
        """
        metadata = [("conveyor-diagnostics", "echo")] if self.echo else []
        if self.token_file is not None:
            try:
                metadata.append(("authorization", f"Bearer {self.token_file.read_text().strip()}"))
            except OSError as error:
                raise LoadError(f"{self.token_file} cannot be read: {error.strerror}") from error
        return metadata

    @property
    def tick(self) -> float:
        """Least time between two looks at the network, in seconds.

        A look costs the client some 0.1 ms before its first message, so looks are spaced to find several: in an open
        loop of many small arrivals so that they take about half a core, and in a closed loop by a small part of the
        time that its steps are on their way, which then costs no throughput. Few steps, and a closed loop's frames, are
        looked for at once.
        """
        if self.tick_s is not None:
            return self.tick_s
        if self.pattern is Pattern.CLOSED:
            steps = 0 if self.frames else self.sessions * self.in_flight
            return min(_LONGEST_TICK_S, steps * _TICK_PER_STEP_S) if steps >= _MANY_STEPS else 0.0
        if self.pattern is Pattern.BURST or 2 * self.rate_per_s * _LOOK_S < _FEW_CORES:
            return 0.0
        return _LOOK_S / max(0.15, _MANY_CORES - self.rate_per_s * _STEP_S)
