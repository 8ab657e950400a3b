"""The load client: lanes of the load generator and of the SDK, one process.

Invariant: whoever answers, the loop is the same; only the address and what is asked differ.
"""

import gc
from collections.abc import Mapping
from typing import Protocol

from conveyor.bench import Load, LoadError, LoadResult, LoadSpec
from conveyor.bench.model import inputs_of

from benchmarks.cases import ECHOES, SDK, Case, Client, Target
from benchmarks.figures import Done, Figures
from benchmarks.sdk import SdkLane


class Lane(Protocol):
    """A case's load, opened once and run as often as wanted; between two runs it is silent."""

    def open(self) -> None:
        """Connects, creates the sessions and has each step once."""

    def run(self, seconds: float) -> Done:
        """Puts load on for that long; returns when all that was sent is answered."""

    def figures(self) -> Figures:
        """What was seen in the last run."""

    def tend(self) -> None:
        """Answers what the server asked meanwhile."""

    def close(self) -> None:
        """Ends sessions, streams and connections in order."""


class LoadDriver:
    """Lanes of a group's cases. See worker.Driver.

    Args:
        addresses: `host:port` of each target.
    """

    def __init__(self, addresses: Mapping[Target, str]) -> None:
        self._addresses = addresses
        self._lanes: dict[str, Lane] = {}
        self._last: Lane | None = None

    def open(self, case: Case) -> None:
        """Connects, creates the sessions and has each step once."""
        self._lanes[case.name] = lane = self._lane(case)
        lane.open()
        # What lives until the group's end is not worth looking through in the middle of a run.
        gc.collect()
        gc.freeze()

    def run(self, case: Case, seconds: float) -> Done:
        """Puts the case's load on for that long."""
        self._last = self._lanes[case.name]
        return self._last.run(seconds)

    def figures(self) -> Figures:
        """Of the last run."""
        if self._last is None:
            raise LoadError("nothing was run")
        return self._last.figures()

    def tend(self) -> None:
        """Keeps all that is open alive."""
        for lane in self._lanes.values():
            lane.tend()

    def clear(self) -> None:
        """Ends all that is open."""
        while self._lanes:
            self._lanes.popitem()[1].close()
        self._last = None
        gc.unfreeze()

    def close(self) -> None:
        """As clear."""
        self.clear()

    def _lane(self, case: Case) -> Lane:
        address = self._addresses[case.target]
        if case.client in SDK:
            return SdkLane(address, case)
        # A bare echo knows no models; it is sent what the server's would take.
        return RawLane(address, case, self._addresses[Target.FULL])


class RawLane:
    """The load generator's closed loop. See Lane.

    Args:
        address: `host:port` of who answers.
        case: what load.
        server: `host:port` of who knows the model.
    """

    def __init__(self, address: str, case: Case, server: str) -> None:
        self._case = case
        self._result = LoadResult()
        spec = LoadSpec(
            model=f"{case.model}.null" if case.target is Target.NULL else case.model,
            sessions=case.sessions,
            streams=case.streams,
            connections=case.connections,
            frames=case.client is Client.FRAMES,
            in_flight=case.in_flight,
            echo=case.target in ECHOES,
        )
        self._load = Load(address, spec, inputs_of(server, LoadSpec(model=case.model)))

    def open(self) -> None:
        """As Lane.open."""
        self._load.open()

    def run(self, seconds: float) -> Done:
        """As Lane.run.

        Raises:
            LoadError: a step was refused, or the load broke.
        """
        self._result = self._load.run(seconds)
        if self._result.refused:
            raise LoadError(f"{self._case.name}: steps were refused: {', '.join(self._result.refused)}")
        return Done(self._result.steps, self._result.requests)

    def figures(self) -> Figures:
        """As Lane.figures."""
        result = self._result
        latency = result.latency.percentiles()
        # A frame has a token of each session, so there a session's tokens are its stream's messages.
        messages = result.served if self._case.frames else result.served_streams
        return Figures(
            p50_s=latency.p50_s,
            p99_s=latency.p99_s,
            fewest=int(result.served.min()),
            most=int(result.served.max()),
            streams=result.active_streams,
            fewest_messages=int(messages.min()),
            most_messages=int(messages.max()),
            request_bytes=result.request_bytes / max(1, result.requests),
            reply_bytes=result.reply_bytes / max(1, result.replies),
        )

    def tend(self) -> None:
        """As Lane.tend."""
        self._load.tend()

    def close(self) -> None:
        """As Lane.close."""
        self._load.close()
