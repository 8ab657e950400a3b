"""Finds the batch and time axes of a module's inputs by running it at other sizes and watching its recurrent calls.

Nothing is read from names or conventions alone: an assignment of axes counts only if the module runs with it and the
recurrent calls see the batch and the time steps that it says.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from conveyor_export.capture.axes import Axes, resize
from conveyor_export.capture.calls import RecurrentCall
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.observe import Observation, observe
from conveyor_export.capture.paths import ModulePaths
from conveyor_export.capture.signature import Leaf, Signature

BATCH = 3
_LENGTHS = re.compile(r"(^|[._])len(s|gth|gths)?($|[._0-9])|length")
# Sequences are probed and traced at this length or more: what forward() does with fewer steps (an `if` for one step, a
# slice that leaves one) is the same function written otherwise, and no reason to refuse it.
MIN_TIME = 8
_MAX_ASSIGNMENTS = 64


class Pace(Enum):
    """How the module walks over time."""

    # Every recurrent call covers all time steps; none where the module only convolves.
    SEQUENCE = "sequence"
    # A Python loop over time: the number of calls grows with the time steps.
    LOOP = "loop"
    # forward() takes one time step.
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class Layout:
    """Axes of every input.

    Attributes:
        axes: by leaf name.
        lengths: leaf that holds the rows' lengths, as `[batch]` integers.
        pace: how the module walks over time.
        time: a number of time steps, above 1, that the module was seen to run with.
    """

    axes: Mapping[str, Axes]
    lengths: str | None
    pace: Pace
    time: int


class Prober:
    """Runs the module at chosen sizes with inputs like the example."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        self.module = module
        self.signature = signature
        self.paths = ModulePaths(module)

    def draw(self, layout: Layout, batch: int, time: int, seeds: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Module inputs by leaf name; all leaves from seed 0, except those that `seeds` names."""
        values = {}
        for index, leaf in enumerate(self.signature.leaves):
            changed = (seeds or {}).get(leaf.name, 0)
            if leaf.name == layout.lengths:
                values[leaf.name] = leaf.value.new_full((batch,), time)
            else:
                axes, seed = layout.axes[leaf.name], changed * 1009 + index
                values[leaf.name] = resize(leaf.value, axes, (batch, time), seed, widen=bool(changed))
        return values

    def run(self, values: Mapping[str, Tensor]) -> Observation:
        """One observed run; exceptions of the module pass through."""
        args, kwargs = self.signature.call(values)
        return observe(self.module, args, kwargs, self.paths)


def find_layout(prober: Prober) -> Layout:
    """The first assignment of axes that the module confirms.

    Raises:
        CaptureError: the module does not run on the example, is bidirectional, or follows no known layout.
    """
    example = _run_example(prober)
    lengths = _lengths_leaf(prober.signature.leaves, example)
    first_error: Exception | None = None
    for axes in itertools.islice(_assignments(prober.signature.leaves, lengths), _MAX_ASSIGNMENTS):
        timed = any(item.time is not None for item in axes.values())
        for pace in (Pace.SEQUENCE,) if timed else (Pace.SINGLE,):
            layout = Layout(axes, lengths, pace, _probe_time(prober.signature.leaves, axes))
            try:
                confirmed = _confirm(prober, layout)
            except CaptureError:
                raise
            except Exception as error:
                first_error = first_error or error
                continue
            if confirmed is not None:
                return confirmed
    if first_error is None and example.calls:
        call = example.calls[0]
        raise CaptureError(
            f"it is called on {call.batch} rows of {call.time} steps, which are not batch and time of any input: "
            "it runs along another axis than time",
            path=call.path,
            advice="Only recurrence along the input's time axis can be streamed",
        )
    detail = f" (at other sizes it raised {type(first_error).__name__}: {first_error})" if first_error else ""
    raise CaptureError(
        f"no batch and time axis found in its inputs{detail}",
        advice="Give inputs as [batch, time, ...] or [time, batch, ...], and let forward() take any batch and time",
    )


def _run_example(prober: Prober) -> Observation:
    values = {leaf.name: leaf.value for leaf in prober.signature.leaves}
    try:
        observation, again = (prober.run({name: value.clone() for name, value in values.items()}) for _ in range(2))
    except Exception as error:
        where = prober.paths.current
        reason = f"forward raised {type(error).__name__} on the example inputs: {error}"
        raise CaptureError(reason, path=where, advice="Give example inputs that the module runs on") from error
    for call in observation.calls:
        if call.bidirectional:
            raise CaptureError(
                "it is bidirectional: its backward direction reads the sequence from the end, "
                "so no answer can be given before the last time step",
                path=call.path,
                advice="Train a unidirectional layer to stream",
            )
    for call, repeated in zip(observation.calls, again.calls, strict=False):
        if not _same_start(call, repeated):
            raise CaptureError(
                "its initial state differs between two runs on the same input: it is random, or the module keeps "
                "it in an attribute between calls",
                path=call.path,
                advice="Start from zeros or from a parameter inside forward(), or pass the state through its signature",
            )
    return observation


def _same_start(call: RecurrentCall, other: RecurrentCall) -> bool:
    return all(
        torch.equal(states[role], again[role])
        for states, again in zip(call.initial, other.initial, strict=True)
        for role in call.roles
    )


def _lengths_leaf(leaves: list[Leaf], example: Observation) -> str | None:
    """The `[batch]` integers that pack_padded_sequence was given, or that are called lengths."""
    packed = [sorted(lengths.tolist()) for lengths in example.packed_lengths]
    for leaf in leaves:
        if leaf.value.dim() == 1 and not leaf.value.is_floating_point():
            named = _LENGTHS.search(leaf.name.lower())
            if leaf.listed or named or sorted(leaf.value.tolist()) in packed:
                return leaf.name
    return None


def _assignments(leaves: list[Leaf], lengths: str | None) -> Iterator[dict[str, Axes]]:
    """Candidate axes for all leaves, the likely ones first."""
    primary = next(leaf for leaf in leaves if leaf.name != lengths)
    rank = primary.value.dim()
    orders = [(0, 1), (1, 0)] if rank >= 2 else []
    if rank >= 3:
        orders.append((0, rank - 1))
    for batch_axis, time_axis in orders:
        batch, time = primary.value.shape[batch_axis], primary.value.shape[time_axis]
        yield from _fill(leaves, lengths, primary, Axes(batch_axis, time_axis), batch=batch, time=time)
    if rank >= 1:
        yield from _fill(leaves, lengths, primary, Axes(0), batch=primary.value.shape[0], time=None)


def _fill(
    leaves: list[Leaf], lengths: str | None, primary: Leaf, axes: Axes, *, batch: int, time: int | None
) -> Iterator[dict[str, Axes]]:
    groups: dict[tuple[str, int], list[Axes]] = {}
    for leaf in leaves:
        # Tensors of one rank in one argument, such as the states of several layers, are laid out alike.
        key = (leaf.parameter, leaf.value.dim())
        options = [axes] if leaf is primary else _options(leaf, lengths, axes, batch=batch, time=time)
        groups[key] = [item for item in groups[key] if item in options] if key in groups else options
    for combination in itertools.product(*groups.values()):
        chosen = dict(zip(groups, combination, strict=True))
        yield {leaf.name: chosen[leaf.parameter, leaf.value.dim()] for leaf in leaves}


def _options(leaf: Leaf, lengths: str | None, axes: Axes, *, batch: int, time: int | None) -> list[Axes]:
    """Axes that one leaf may have, by its sizes."""
    if leaf.name == lengths:
        return [Axes(0)]
    shape = leaf.value.shape
    options = []
    if axes.time is not None and axes.batch is not None and len(shape) > max(axes.batch, axes.time):
        fits = shape[axes.batch] == batch and shape[axes.time] == time
        options += [axes] if fits else []
    options += [Axes(0)] if len(shape) >= 1 and shape[0] == batch else []
    options += [Axes(1)] if len(shape) >= 2 and shape[1] == batch else []
    return options or [Axes(None)]


def _probe_time(leaves: list[Leaf], axes: Mapping[str, Axes]) -> int:
    """Time steps to probe with: the example's own where that is a sequence, as short convolutions need some."""
    for leaf in leaves:
        time = axes[leaf.name].time
        if time is not None:
            return min(max(leaf.value.shape[time], MIN_TIME), 4 * MIN_TIME)
    return 1


def _confirm(prober: Prober, layout: Layout) -> Layout | None:
    """The layout with its pace, or None where the recurrent calls see other sizes than it says."""
    if layout.pace is Pace.SINGLE:
        calls = prober.run(prober.draw(layout, BATCH, 1)).calls
        prober.run(prober.draw(layout, BATCH + 2, 1))
        return layout if all((call.batch, call.time) == (BATCH, 1) for call in calls) else None
    time, other = layout.time, layout.time + 2
    calls = prober.run(prober.draw(layout, BATCH, time)).calls
    more = prober.run(prober.draw(layout, BATCH + 1, other)).calls
    if not calls:
        return layout
    if len(calls) == len(more):
        rows = [(call.batch, again.batch) for call, again in zip(calls, more, strict=True)]
        steps = any(call.time != again.time for call, again in zip(calls, more, strict=True))
        return layout if (BATCH, BATCH + 1) in rows and steps else None
    per_step = (len(more) - len(calls)) / 2
    if calls[-1].batch == BATCH and more[-1].batch == BATCH + 1 and per_step == int(per_step) > 0:
        return Layout(layout.axes, layout.lengths, Pace.LOOP, time)
    return None
