"""Contexts as session state: their names, fresh rows, and final values in a run of the original module."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conveyor_export.capture.observe import Observation
from conveyor_export.capture.rewrite import LookBack


@dataclass(frozen=True, slots=True)
class Context:
    """One context: `name` is StateSpec.name, `row` a fresh session's row."""

    name: str
    look_back: LookBack
    row: Tensor


def name_contexts(look_backs: Sequence[LookBack], root: str) -> list[Context]:
    """`conv1.context`, and `conv1.context#2` for a second one under the same module path."""
    seen: Counter[str] = Counter()
    named = []
    for item in look_backs:
        path = item.path or root
        seen[path] += 1
        suffix = f"#{seen[path]}" if seen[path] > 1 else ""
        row = torch.full(item.row_shape, item.fill, dtype=item.dtype)
        named.append(Context(f"{path}.context{suffix}", item, row))
    return named


def observed_contexts(contexts: Sequence[Context], observation: Observation) -> Mapping[str, Tensor]:
    """The last steps that each context would hold after an observed run, `[batch, *row]` by name."""
    calls = {(call.operator, call.path, call.ordinal): call for call in observation.lookbacks}
    values = {}
    for context in contexts:
        item = context.look_back
        call = calls[item.operator, item.path, item.ordinal]
        given = call.args[0] if call.args else call.kwargs.get("input", call.kwargs.get("tensors"))
        x = given if isinstance(given, Tensor) else given[item.part]
        if item.untrimmed:
            x = call.uncut[id(x)]
        shape = list(x.shape)
        shape[item.axis] = item.steps
        whole = torch.cat([x.new_full(shape, item.fill), x], item.axis)
        tail = whole.narrow(item.axis, whole.shape[item.axis] - item.steps, item.steps)
        values[context.name] = torch.movedim(tail, item.batch_axis, 0)
    return values
