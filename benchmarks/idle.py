"""`make bench-idle`: what idle sessions cost, and whether ten thousand streams leave the busy ones their rate.

First 100,000 sessions are created by a gateway, take one step each, and are let go; the server's resident memory tells
what one costs, attached and detached. Then 10,000 streams are opened at once while 256 others are under load: all must
be answered, and once they are silent, the busy ones must have their rate back.
"""

import argparse
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from conveyor.bench import Load, LoadResult, LoadSpec
from conveyor.bench.fleet import Fleet
from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1.model_pb2_grpc import ModelServiceStub

from benchmarks.program import Findings, Goal, figures_of, run
from benchmarks.service import Service
from benchmarks.stage import MODEL, Stage, resident_bytes, say, stage

# Beside 1.3 times its state, a session may take so many bytes.
SHARE, BESIDE_BYTES = 1.3, 300
STREAM_BYTES = 25 << 10
RATE = 0.90
_LOOK_S, _QUICK_LOOK_S = 1.5, 0.2
_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Idle:
    """Resident bytes of a server.

    Attributes:
        before: with no session.
        attached: with all of them on streams.
        detached: with all of them, and no stream.
        sessions: how many.
        state_bytes: of one session, as the model says.
    """

    before: int
    attached: int
    detached: int
    sessions: int
    state_bytes: int

    @property
    def limit_bytes(self) -> float:
        """What a session may cost."""
        return SHARE * self.state_bytes + BESIDE_BYTES

    def each(self, resident: int) -> float:
        """Bytes of one session."""
        return (resident - self.before) / self.sessions


@dataclasses.dataclass(frozen=True, slots=True)
class Crowd:
    """Many streams beside few busy ones.

    Attributes:
        opened_s: how long it took to open all of them and have each answered once.
        at_once: the load on all of them at once, while the others were busy.
        before_bytes, after_bytes: resident, without them and with them silent.
        alone, beside: steps per second of the busy ones, without them and while they were silent.
    """

    opened_s: float
    at_once: LoadResult
    before_bytes: int
    after_bytes: int
    alone: Sequence[float]
    beside: Sequence[float]


def judge_idle(idle: Idle) -> list[Goal]:
    """The goal of sessions that do nothing."""
    found = []
    for what, resident in (("detached", idle.detached), ("attached", idle.attached)):
        cost = idle.each(resident)
        text = (
            f"{idle.sessions:,} idle sessions, {what}: {cost:,.0f} bytes each with {idle.state_bytes:,} of state; "
            f"{idle.limit_bytes:,.0f} allowed"
        )
        found.append(Goal(text, cost <= idle.limit_bytes))
    return found


def judge_crowd(crowd: Crowd) -> list[Goal]:
    """The goals of many streams."""
    served = crowd.at_once.served
    cost = (crowd.after_bytes - crowd.before_bytes) / len(served)
    ratio = statistics.median(crowd.beside) / statistics.median(crowd.alone)
    return [
        Goal(
            f"{len(served):,} streams opened at once under load: all answered after {crowd.opened_s:.1f} s; then all "
            f"stepping: fewest {served.min():,}, most {served.max():,} steps",
            bool(served.min() >= 1),
        ),
        Goal(
            f"an open stream and its session: {cost / 1024:.1f} KiB, to be under {STREAM_BYTES >> 10}",
            cost < STREAM_BYTES,
        ),
        Goal(
            f"the busy ones beside them: {ratio:.0%} of their rate alone ({statistics.median(crowd.alone):,.0f} "
            f"steps/s), {RATE:.0%} wanted",
            ratio >= RATE,
        ),
    ]


def state_bytes(service: Service) -> int:
    """Of a session, as the server tells."""
    with grpc.insecure_channel(service.address) as channel:
        stub: Any = ModelServiceStub(channel)
        model = stub.GetModel(model_pb2.GetModelRequest(name=MODEL), timeout=_PATIENCE_S).model
    return int(model.spec.state_bytes)


def settled(service: Service, look_s: float) -> int:
    """Resident bytes, once they change no more. Nothing tells when that is, so this looks every `look_s` seconds."""
    resident, end = resident_bytes(service.pid), time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        time.sleep(look_s)
        before, resident = resident, resident_bytes(service.pid)
        if abs(resident - before) < 1 << 16:
            return resident
    return resident


def measure_idle(on: Stage, sessions: int, look_s: float) -> Idle:
    """Creates sessions, has each take a step, and lets go of them."""
    service = on.serve("--max-sessions", str(sessions * 11 // 10 + 1000), "--idle-timeout-s", "3600")
    spec = LoadSpec(model=MODEL, sessions=1024, streams=16, connections=4, frames=True, opening=512)
    # What the first sessions of a server cost is not what one more costs.
    warm = Load(service.address, spec)
    warm.open()
    warm.close()
    before = settled(service, look_s)
    load = Load(service.address, dataclasses.replace(spec, sessions=sessions))
    say(f"creating {sessions:,} sessions")
    try:
        load.open()
        attached = settled(service, look_s)
    finally:
        load.abandon()
    detached = settled(service, look_s)
    return Idle(before, attached, detached, sessions, state_bytes(service))


def measure_crowd(on: Stage, streams: int, seconds: float, rounds: int, look_s: float) -> Crowd:
    """Opens many streams beside busy ones."""
    service = on.serve("--max-sessions", str(streams + 1000), "--idle-timeout-s", "3600")
    busy = LoadSpec(model=MODEL, sessions=256, streams=256, connections=8)
    crowd = LoadSpec(
        model=MODEL, sessions=streams, streams=streams, connections=16, opening=streams, answer_timeout_s=_PATIENCE_S
    )
    with Fleet(service.address, busy, 1) as fleet:
        fleet.run(min(1.0, seconds))
        alone = [fleet.run(seconds).steps_per_s for _ in range(rounds)]
        before = settled(service, look_s)
        load = Load(service.address, crowd)
        try:
            say(f"opening {streams:,} streams under load")
            under_load = _Meanwhile(fleet)
            began = time.monotonic()
            load.open()
            opened_s = time.monotonic() - began
            at_once = load.run(seconds)
            under_load.stop()
            after = settled(service, look_s)
            beside = []
            for _ in range(rounds):
                load.tend()
                beside.append(fleet.run(seconds).steps_per_s)
            load.tend()
        finally:
            load.close()
    return Crowd(opened_s, at_once, before, after, alone, beside)


class _Meanwhile:
    """A fleet at work in the background until told to stop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="busy")
        self._thread.start()

    def stop(self) -> None:
        """Returns once it rests; raises what went wrong meanwhile."""
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                self._fleet.run(1.0)
        except Exception as error:  # told where it is waited for
            self._failure = error


def measure(settings: argparse.Namespace) -> Findings:
    """Both parts, a server each."""
    if settings.quick:
        settings.sessions, settings.streams, settings.seconds, settings.rounds = 2000, 300, 0.2, 1
    look_s = _QUICK_LOOK_S if settings.quick else _LOOK_S
    with stage() as on:
        idle = measure_idle(on, settings.sessions, look_s)
        crowd = measure_crowd(on, settings.streams, settings.seconds, settings.rounds, look_s)
    figures = {
        "idle": {**dataclasses.asdict(idle), "detached_each": idle.each(idle.detached)},
        "crowd": {
            "opened_s": crowd.opened_s,
            "at_once": figures_of(crowd.at_once),
            "before_bytes": crowd.before_bytes,
            "after_bytes": crowd.after_bytes,
            "alone_per_s": list(crowd.alone),
            "beside_per_s": list(crowd.beside),
        },
    }
    return Findings(figures, [*judge_idle(idle), *judge_crowd(crowd)])


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=100_000, help="that do nothing (%(default)s)")
    parser.add_argument("--streams", type=int, default=10_000, help="opened at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the busy streams' rate (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("idle", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
