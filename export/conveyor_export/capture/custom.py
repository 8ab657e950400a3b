"""Explicit state of the module's own making: an argument that forward() returns renewed, in the same structure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.layout import BATCH, Layout, Pace, Prober
from conveyor_export.capture.outputs import OutputLeaf, flatten
from conveyor_export.capture.plan import CustomState

_STATE_LIKE = re.compile(
    r"^(h|c|s|hx|cx|h0|c0|hc|prev.*|past.*)$|state|hidden|carry|memor|cache|context|cell", re.IGNORECASE
)
_TIME = 4


def returned_as(
    prober: Prober, layout: Layout, parameter: str, output: Any, leaves: Sequence[OutputLeaf]
) -> tuple[int, ...] | None:
    """Positions of the returned tensors that renew a parameter: same structure, same shapes, no time; the last such.

    An output under the parameter's own name wins over the others.
    """
    names = [leaf.name for leaf in prober.signature.leaves if leaf.parameter == parameter]
    if any(layout.axes[name].time is not None for name in names):
        return None
    values = prober.draw(layout, BATCH, layout.time)
    wanted = _shapes(prober.signature.argument(parameter, values))
    candidates = []
    for keys, part in _parts(output):
        positions = tuple(leaf.index for leaf in leaves if leaf.keys[: len(keys)] == keys)
        if positions and _shapes(part) == wanted and len(positions) == len(names):
            if layout.pace is not Pace.SINGLE and any(leaf.has_time for leaf in leaves if leaf.index in positions):
                continue
            candidates.append((keys[-1:] == (parameter,), positions))
    if not candidates:
        return None
    named = [positions for own, positions in candidates if own]
    return named[-1] if named else candidates[-1][1]


def find_custom(
    prober: Prober,
    layout: Layout,
    parameters: Sequence[str],
    output: Any,
    leaves: Sequence[OutputLeaf],
    *,
    recurrent: bool,
) -> tuple[CustomState, ...]:
    """Custom states among the leaves of `parameters`, which are not states of layers.

    Raises:
        CaptureError: the example rows of such a state differ, so a fresh session's row is unknown.
    """
    states: list[CustomState] = []
    # Backwards: of several alike, the last parameter is renewed by the last output.
    for parameter in reversed(parameters):
        taken = {state.output for state in states}
        free = [leaf for leaf in leaves if leaf.index not in taken]
        positions = returned_as(prober, layout, parameter, output, free)
        if positions is None or not _is_state(prober, layout, parameter, positions, recurrent=recurrent):
            continue
        names = [leaf.name for leaf in prober.signature.leaves if leaf.parameter == parameter]
        for name, position in reversed(list(zip(names, positions, strict=True))):
            leaf = next(leaf for leaf in prober.signature.leaves if leaf.name == name)
            public = layout.axes[name].to_public(leaf.value, BATCH)
            if not all(torch.equal(row, public[0]) for row in public):
                raise CaptureError(
                    f"the rows of state {name!r} in the example inputs differ, and a fresh session has one row",
                    advice="Give the state that a sequence starts from, usually zeros",
                )
            states.append(CustomState(name, name, position, public[0].clone()))
    return tuple(reversed(states))


def _is_state(prober: Prober, layout: Layout, parameter: str, positions: tuple[int, ...], *, recurrent: bool) -> bool:
    """True where two half runs with the value handed over give the whole run; by name, where that cannot be run."""
    if layout.pace is Pace.SINGLE or recurrent:
        return not recurrent or bool(_STATE_LIKE.search(parameter))
    values = prober.draw(layout, BATCH, _TIME)
    names = [leaf.name for leaf in prober.signature.leaves if leaf.parameter == parameter]
    try:
        whole = flatten(prober.run(values).output)
        first = flatten(prober.run(_steps(layout, values, 0, 2)).output)
        handed = dict(zip(names, (first[position] for position in positions), strict=True))
        second = flatten(prober.run(_steps(layout, values, 2, 2) | handed).output)
    except (RuntimeError, ValueError, IndexError):
        return bool(_STATE_LIKE.search(parameter))
    return all(torch.allclose(whole[position], second[position], atol=1e-5) for position in positions)


def _steps(layout: Layout, values: Mapping[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
    cut = {}
    for name, value in values.items():
        axis = layout.axes[name].time
        cut[name] = value if axis is None else value.narrow(axis, start, count)
        if name == layout.lengths:
            cut[name] = torch.full_like(value, count)
    return cut


def _parts(output: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    """The returned value itself and, where it is a tuple, list or dict, its elements."""
    parts: list[tuple[tuple[str | int, ...], Any]] = [((), output)]
    if isinstance(output, Mapping):
        parts += [((str(key),), value) for key, value in output.items()]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts += [((name,), value) for name, value in zip(output._fields, output, strict=True)]
    elif isinstance(output, tuple | list):
        parts += [((index,), value) for index, value in enumerate(output)]
    return parts


def _shapes(value: Any) -> tuple[str, list[Any]]:
    flat, spec = pytree.tree_flatten(value)
    shapes = [(tuple(item.shape), item.dtype) if isinstance(item, Tensor) else item for item in flat]
    return str(spec).replace("list", "tuple"), shapes
