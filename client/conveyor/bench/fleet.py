"""A load over several processes: each has its share of sessions, streams, connections and rate.

Invariant: all processes have opened before any runs, and their runs begin together; one that fails ends them all.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any

from conveyor.bench.histogram import Histogram
from conveyor.bench.result import LoadResult
from conveyor.bench.spec import LoadError, LoadSpec
from conveyor.bench.worker import Close, Failure, Open, Run, Snapshot, work

Told = Callable[[Snapshot], None]
_spawn = multiprocessing.get_context("spawn")
_STOP_TIMEOUT_S = 10.0


def shares(spec: LoadSpec, processes: int) -> list[LoadSpec]:
    """What each process does, as even as can be.

    Raises:
        ValueError: more processes than connections.
    """
    if not 1 <= processes <= spec.connections:
        raise ValueError(f"{processes} processes need as many connections, and there are {spec.connections}")
    sessions, streams, connections = (
        [(index + 1) * count // processes - index * count // processes for index in range(processes)]
        for count in (spec.sessions, spec.streams, spec.connections)
    )
    return [
        replace(
            spec,
            sessions=sessions[index],
            streams=streams[index],
            connections=connections[index],
            rate_per_s=spec.rate_per_s * sessions[index] / spec.sessions,
            seed=spec.seed + index,
        )
        for index in range(processes)
    ]


class Fleet:
    """Processes under load. Use as a context manager; they end with it.

    Args:
        target: HOST:PORT.
        spec: the load of all together.
        processes: how many.
    """

    def __init__(self, target: str, spec: LoadSpec, processes: int) -> None:
        self._pipes: list[Pipe] = []
        self._processes: list[Any] = []
        self._work = [(target, share) for share in shares(spec, processes)]

    def __enter__(self) -> "Fleet":
        """Starts the processes and opens their sessions."""
        try:
            for arguments in self._work:
                ours, theirs = _spawn.Pipe()
                self._pipes.append(ours)
                process = _spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
                process.start()
                self._processes.append(process)
                theirs.close()
            self._all(Open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes all sessions, unless something went wrong, and ends the processes."""
        try:
            if kind is None:
                self._all(Close())
        finally:
            self._stop()

    def run(self, seconds: float, told: Told | None = None) -> LoadResult:
        """Puts the load on for that long.

        Args:
            seconds: how long.
            told: hears of all processes together, about twice a second.

        Raises:
            LoadError: a process failed.
        """
        result = LoadResult()
        for found in self._all(Run(seconds, told is not None), told):
            result.add(found)
        return result

    def _all(self, command: Open | Run | Close, told: Told | None = None) -> list[Any]:
        """Has all processes carry out a command; returns their answers, in order."""
        for pipe in self._pipes:
            try:
                pipe.send(command)
            except ConnectionError:
                self._lost(pipe)
        answers: dict[int, Any] = {}
        snapshots: dict[int, Snapshot] = {}
        while len(answers) < len(self._pipes):
            for ready in wait([pipe for index, pipe in enumerate(self._pipes) if index not in answers]):
                index = self._pipes.index(ready)  # type: ignore[arg-type]
                answer = self._receive(self._pipes[index])
                if not isinstance(answer, Snapshot):
                    answers[index] = answer
                    continue
                snapshots[index] = answer
                if told and len(snapshots) == len(self._pipes):
                    told(_together(list(snapshots.values())))
                    snapshots.clear()
        return [answers[index] for index in range(len(self._pipes))]

    def _receive(self, pipe: Pipe) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            self._lost(pipe)
        if isinstance(answer, Failure):
            raise LoadError(answer.message, reason=answer.reason)
        return answer

    def _lost(self, pipe: Pipe) -> None:
        process = self._processes[self._pipes.index(pipe)]
        process.join(_STOP_TIMEOUT_S)
        raise LoadError(f"a process of the load ended by itself, with exit status {process.exitcode}")

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            # One that ended in order is waited for; one that still works is not.
            process.terminate()
            process.join(_STOP_TIMEOUT_S)
            process.close()


def _together(snapshots: list[Snapshot]) -> Snapshot:
    latency = Histogram()
    for snapshot in snapshots:
        latency.add(snapshot.latency)
    return Snapshot(
        max(snapshot.elapsed_s for snapshot in snapshots),
        sum(snapshot.steps for snapshot in snapshots),
        sum(snapshot.refused for snapshot in snapshots),
        latency,
    )
