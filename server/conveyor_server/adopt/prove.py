"""The proof of a description: sessions that are served together against each alone in the file itself, to the bit.

Invariant: what is compared was computed twice by different code: by the step model that is served, in batches whose
company changes with every run, and by the file in plain onnxruntime, one session after the other. Where a row is never
to be alone (`batch: company`), it is not alone in the file either: an empty row is beside it.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from conveyor_proto.codec import Array
from numpy.typing import NDArray

from conveyor_server.adopt.answers import Refused
from conveyor_server.adopt.original import Memory, Original, row_of
from conveyor_server.adopt.sample import Samples
from conveyor_server.runner.base import Run, RunFailed
from conveyor_server.runner.description import Description
from conveyor_server.runner.fitting import Fitted, fit
from conveyor_server.runner.layout import Layout
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.plain import PlainSession, open_as_served

# In turns until each session has had its time steps: every session is alone at times, one of two, and one of many. The
# largest is the largest that a server chooses.
_BATCHES = (1, 2, 3, 5, 8, 16, 32, 64, 128, 256)
_TIME_STEPS = 10
_MOST, _LEAST = 256, 8
# What stepping all sessions alone may take; a slower file is proved with fewer of them.
_ALONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found.

    Attributes:
        sessions: that were stepped.
        time_steps: of all of them together.
        rows: sizes of the batches they were served in.
        company: each session had an empty row beside it in the file.
        differing: answers and states -> the largest absolute difference, of those that are not the same bits.
        unmoved: states that were what they began with after every step.
    """

    sessions: int
    time_steps: int
    rows: tuple[int, ...]
    company: bool
    differing: Mapping[str, float]
    unmoved: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """All bits were the same."""
        return not self.differing

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(self.differing.values(), default=0.0)

    def __str__(self) -> str:
        """One clause, for a comment."""
        batches = "row by row" if self.rows == (1,) else f"in batches of {', '.join(map(str, self.rows))}"
        told = "the same bits" if self.exact else f"differences of up to {self.worst:.3g}"
        alone = "each beside an empty row" if self.company else "each alone"
        return f"{self.sessions} sessions, {self.time_steps} time steps {batches}, and {alone} in the file: {told}"


def prove(
    proto: onnx.ModelProto, path: Path, session: PlainSession, description: Description, example: Mapping[str, Array]
) -> Proof:
    """Steps sessions both ways. Blocks for seconds.

    Args:
        proto: the file's own graph.
        path: the file.
        session: of the file.
        description: of it, with outputs.
        example: as of Samples.

    Raises:
        Refused: one of the two ways fails.
        RunnerUnavailable: what comes of file and description cannot be served.
    """
    fitted = fit(proto, description)
    original = Original(session, fitted)
    try:
        sessions = _sessions(original, fitted, example)
        runner = open_as_served(proto, description, path, 2 * sessions)
    except RunFailed as error:
        raise Refused(f"the file does not run as it is described: {error}") from error
    try:
        trial = _Trial(original, runner, fitted, example, sessions)
        trial.run()
    except RunFailed as error:
        raise Refused(f"the file does not run as it is described: {error}") from error
    finally:
        runner.close()
    return trial.proof()


def _sessions(original: Original, fitted: Fitted, example: Mapping[str, Array]) -> int:
    """How many sessions can be stepped alone in reasonable time: a power of two."""
    samples, memory, names = Samples(fitted.inputs, example), original.fresh(), [item.name for item in fitted.outputs]
    fastest = math.inf
    for _ in range(3):
        began = time.perf_counter()
        original.step([memory], [samples.draw()], names)
        fastest = min(fastest, time.perf_counter() - began)
    sessions = _MOST
    while sessions > _LEAST and sessions * _TIME_STEPS * fastest > _ALONE_S:
        sessions //= 2
    return sessions


class _Trial:
    """Both ways side by side: a session has a row of the slab here, and a memory there."""

    def __init__(
        self, original: Original, runner: OnnxRunner, fitted: Fitted, example: Mapping[str, Array], sessions: int
    ) -> None:
        self._original, self._runner, self._fitted = original, runner, fitted
        self._names = [layout.name for layout in fitted.outputs]
        self._states = {state.name: index for index, state in enumerate(runner.spec.states)}
        self._samples = Samples(fitted.inputs, example)
        self._sessions = sessions
        self._memories = [original.fresh() for _ in range(sessions)]
        self._at = np.arange(sessions)
        self._batches = tuple(rows for rows in _BATCHES if rows <= (runner.spec.max_rows or sessions))
        self._company = fitted.description.batch == "company"
        self._nothing = {layout.name: np.zeros(layout.shape, layout.dtype) for layout in fitted.inputs}
        self._worst: dict[str, float] = {}
        self._moved: set[str] = set()

    def run(self) -> None:
        for members in self._rounds():
            fresh = np.array([not self._memories[member].begun for member in members])
            taken = [self._samples.draw() for _ in members]
            truth = [self._alone(self._memories[member], row) for member, row in zip(members, taken, strict=True)]
            inputs = [np.stack([row[layout.name] for row in taken])[:, np.newaxis] for layout in self._fitted.inputs]
            sources = self._at[members]
            # Its rows alternate between two slots, as a session's do that is served.
            self._at[members] = (sources + self._sessions) % (2 * self._sessions)
            run = Run(sources, self._at[members], fresh, np.ones(len(members), np.int32), inputs)
            result = self._runner.step(run)
            if not result.finite.all():
                raise Refused(
                    "a state is not finite after a step, and a server refuses such steps. If the values that were fed "
                    "are the reason, give usual ones with --example"
                )
            for index, layout in enumerate(self._fitted.outputs):
                for row, values in enumerate(truth):
                    self._compare(layout.name, result.outputs[index][row, 0], values[layout.name])
            self._compare_states(members)

    def proof(self) -> Proof:
        return Proof(
            self._sessions,
            self._sessions * _TIME_STEPS,
            self._batches,
            self._company,
            self._worst,
            tuple(pair.state.name for pair in self._fitted.pairs if pair.state.name not in self._moved),
        )

    def _rounds(self) -> Iterator[NDArray[np.int64]]:
        """Members of one batch after the other, each in another company every time, until all have their time steps."""
        rng, left, turn = np.random.default_rng(5), np.full(self._sessions, _TIME_STEPS), 0
        while left.any():
            waiting = rng.permutation(np.flatnonzero(left))
            members = waiting[: self._batches[turn % len(self._batches)]]
            left[members] -= 1
            turn += 1
            yield members

    def _alone(self, memory: Memory, row: Mapping[str, Array]) -> dict[str, Array]:
        memories, rows = [memory], [row]
        if self._company:
            memories, rows = [memory, self._original.fresh()], [row, self._nothing]
        values = self._original.step(memories, rows, self._names)
        return {layout.name: _public(layout, value) for layout, value in zip(self._fitted.outputs, values, strict=True)}

    def _compare_states(self, members: NDArray[np.int64]) -> None:
        rows = self._runner.read_rows(self._at[members].tolist())
        for pair in self._fitted.pairs:
            for row, member in enumerate(members):
                truth = self._memories[member].states[pair.state.input]
                self._compare(f"state {pair.state.name}", rows[self._states[pair.state.name]][row], truth)
                if truth.tobytes() != pair.initial.tobytes():
                    self._moved.add(pair.state.name)

    def _compare(self, what: str, served: Array, truth: Array) -> None:
        if served.shape != truth.shape:
            raise Refused(f"{what} is {list(served.shape)} as served and {list(truth.shape)} in the file")
        if served.tobytes() != truth.tobytes():
            difference = float(np.max(np.abs(served.astype(np.float64) - truth.astype(np.float64))))
            # What is not a number on one side only is further away than any number.
            self._worst[what] = max(self._worst.get(what, 0.0), difference if np.isfinite(difference) else np.inf)


def _public(layout: Layout, value: Array) -> Array:
    """The only row and time step of an output of the file, `[*shape]`."""
    if layout.time_axis is not None:
        value = np.take(value, [0], layout.time_axis)
    row = row_of(value, layout.batch_axis, 0)
    return row.reshape(layout.shape)
