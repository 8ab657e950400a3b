"""The ways of feeding one sequence that must all give the same answers.

Invariant: a mode is a schedule, how many time steps each row takes in each call, and nothing else differs between
modes; so when one mode fails, its schedule is the reason.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

from conveyor_export.step_model import StepModel
from conveyor_export.verify_graph import Call, Graph
from conveyor_export.verify_inputs import Sample, cut
from conveyor_export.verify_truth import Figure, Tally, Truth

# In this order an explanation starts from the first that fails.
MODES = ("whole", "alone", "chunked", "one-by-one", "ragged")

# A mode that makes a call for every few steps looks at the beginning of a long sequence.
MAX_SMALL_CALL_TIME_STEPS = 256
# Chunks of up to this many time steps.
MAX_CHUNK = 64
# Calls after which PyTorch is asked about the prefix so far, for outputs that have no time axis.
PREFIXES = 5
RAGGED_ROWS = 3


def run_modes(model: StepModel, graph: Graph, truth: Truth, rng: np.random.Generator) -> list[Figure]:
    """The figures of every mode on one sample, outputs before states in the order of the spec.

    Raises:
        VerificationFailed: the module or the graph could not be run at all in some mode.
    """
    sample = truth.sample
    beginning = truth
    if sample.time > MAX_SMALL_CALL_TIME_STEPS:
        beginning = Truth(model, _cut_sample(model.spec, sample, range(sample.batch), MAX_SMALL_CALL_TIME_STEPS))
    rows = np.resize(np.arange(sample.batch), max(sample.batch, RAGGED_ROWS)).tolist()
    mixed = Truth(model, _cut_sample(model.spec, sample, rows, beginning.sample.time), single=True)
    tallies = [
        _play(graph, truth, "whole", _even([sample.time], sample.batch), rng),
        _alone(graph, sample, rng),
        _play(graph, truth, "chunked", _even(_chunks(sample.time, rng), sample.batch), rng),
        _play(graph, beginning, "one-by-one", _even([1] * beginning.sample.time, sample.batch), rng),
        _play(graph, mixed, "ragged", ragged_schedule(mixed.sample.batch, mixed.sample.time, rng), rng),
    ]
    return [figure for tally in tallies for figure in tally.figures.values()]


def _play(graph: Graph, truth: Truth, mode: str, schedule: NDArray[np.int32], rng: np.random.Generator) -> Tally:
    """Plays a schedule and compares every valid time step, and the states at the end, with PyTorch."""
    tally = _tally(graph.spec, mode, truth.sample.kind)
    # NaN shows padding that leaks by multiplication with zero; but onnxruntime's operators clip NaN away inside their
    # gates (a GRU keeps its state through it), so padding of ordinary values must show the rest.
    for nan_padding in (True, False) if mode == "ragged" else (True,):
        _play_once(tally, graph, truth, schedule, rng, nan_padding)
    return tally


def _play_once(  # noqa: PLR0917 - what is played, on what
    tally: Tally, graph: Graph, truth: Truth, schedule: NDArray[np.int32], rng: np.random.Generator, nan_padding: bool
) -> None:
    ends = schedule.sum(axis=0, dtype=np.int64)
    probes = set(np.linspace(0, len(schedule) - 1, PREFIXES).astype(int).tolist())
    for index, call in enumerate(graph.play(truth.sample.inputs, schedule, rng, nan_padding=nan_padding)):
        for row in np.flatnonzero(call.lengths).tolist():
            _compare_row(tally, graph.spec, truth, call, row, end=int(ends[row]), probe=index in probes)
    for row, end in enumerate(ends.tolist()):
        for state in graph.spec.states:
            expected = truth.state(state.name, row, end)
            tally.compare(state.name, expected, graph.states[state.name][row], f"row {row}, at the end")


def _compare_row(
    tally: Tally, spec: spec_pb2.ModelSpec, truth: Truth, call: Call, row: int, *, end: int, probe: bool
) -> None:
    """One row of one call; `end` is the length of its whole sequence, `probe` whether its prefix is worth a run."""
    start, stop = int(call.starts[row]), int(call.starts[row] + call.lengths[row])
    for item in spec.outputs:
        got = call.outputs[item.name][row]
        if item.has_time:
            expected = truth.output(item.name, row, end)[start:stop]
            tally.compare(item.name, expected, got[: stop - start], f"row {row}", start)
        elif probe or stop == end:
            expected = truth.output(item.name, row, stop)
            tally.compare(item.name, expected, got, f"row {row}, after {stop} time steps")


def _alone(graph: Graph, sample: Sample, rng: np.random.Generator) -> Tally:
    """Each row of the batch run by itself, against the same row in company: both in onnxruntime."""
    spec = graph.spec
    tally = _tally(spec, "alone", sample.kind)
    [company] = graph.play(sample.inputs, _even([sample.time], sample.batch), rng)
    states = graph.states
    for row in range(sample.batch):
        [single] = graph.play(cut(spec, sample.inputs, [row], sample.time), _even([sample.time], 1), rng)
        for item in spec.outputs:
            expected, got = company.outputs[item.name][row], single.outputs[item.name][0]
            tally.compare(item.name, expected, got, f"row {row}", 0 if item.has_time else None)
        for state in spec.states:
            tally.compare(state.name, states[state.name][row], graph.states[state.name][0], f"row {row}, at the end")
    return tally


def ragged_schedule(batch: int, time: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """int32 `[calls, batch]`: rows of different lengths; row 0 takes nothing in the first call, row 1 in the second."""
    left = rng.integers(1, time + 1, batch)
    left[0] = time
    calls: list[NDArray[np.int64]] = []
    most = _most(time)
    while left.any():
        lengths = rng.integers(0 if len(calls) > 1 else 1, most + 1, batch)
        if len(calls) < 2:
            lengths[len(calls)] = 0
        lengths = np.minimum(lengths, left)
        if not lengths.any():
            longest = int(left.argmax())
            lengths[longest] = min(most, left[longest])
        calls.append(lengths)
        left = left - lengths
    return np.stack(calls).astype(np.int32)


def _chunks(time: int, rng: np.random.Generator) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < time:
        sizes.append(min(int(rng.integers(1, _most(time) + 1)), time - sum(sizes)))
    return sizes


def _most(time: int) -> int:
    return max(1, min(time // 3, MAX_CHUNK))


def _even(sizes: Sequence[int], batch: int) -> NDArray[np.int32]:
    return np.repeat(np.asarray(sizes, np.int32)[:, None], batch, axis=1)


def _tally(spec: spec_pb2.ModelSpec, mode: str, inputs: str) -> Tally:
    return Tally(mode, inputs, [item.name for item in spec.outputs] + [state.name for state in spec.states])


def _cut_sample(spec: spec_pb2.ModelSpec, sample: Sample, rows: Sequence[int], time: int) -> Sample:
    return Sample(sample.kind, cut(spec, sample.inputs, list(rows), time), len(rows), time)
