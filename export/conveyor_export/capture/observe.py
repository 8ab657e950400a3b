"""Runs a module eagerly and writes down what it does with time: recurrent calls, packed sequences, paddings.

The module runs its own code on its own functions; only what it calls is recorded.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conveyor_export.capture.calls import RecurrentCall, finals_of, is_recurrent, parse_call
from conveyor_export.capture.paths import ModulePaths

# Functions that may look back over time, by the name of the ATen operator that export writes for them.
LOOKBACK = {
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "pad": "pad",
    "constant_pad_nd": "constant_pad_nd",
    "cat": "cat",
    "concat": "cat",
    "concatenate": "cat",
}


@dataclass(frozen=True, slots=True)
class LookbackCall:
    """One call of a LOOKBACK function.

    Attributes:
        ordinal: counts the calls of that operator under that path.
        uncut: by id of a tensor that is a slice, the tensor that it was cut from.
    """

    operator: str
    path: str
    ordinal: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    uncut: Mapping[int, Tensor]


@dataclass(slots=True)
class Observation:
    """What one run did.

    Attributes:
        output: what forward returned.
        calls: recurrent calls, in order, with their final states.
        packed_lengths: lengths that were given to pack_padded_sequence, in the order they are packed.
        lookbacks: calls that may look back over time, in order.
    """

    output: Any = None
    calls: list[RecurrentCall] = field(default_factory=list)
    packed_lengths: list[Tensor] = field(default_factory=list)
    lookbacks: list[LookbackCall] = field(default_factory=list)


def observe(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], paths: ModulePaths | None = None
) -> Observation:
    """One eager run. Exceptions of the module pass through; `paths` then tells which submodule raised."""
    paths = paths or ModulePaths(module)
    observation = Observation()
    with paths.watch(), _Observer(observation, paths):
        observation.output = module(*args, **kwargs)
    return observation


class _Observer(TorchFunctionMode):
    def __init__(self, observation: Observation, paths: ModulePaths) -> None:
        super().__init__()
        self._seen = observation
        self._paths = paths
        # The slices are kept alive, so that no id is used twice.
        self._uncut: dict[int, Tensor] = {}
        self._slices: list[Tensor] = []
        self._ordinals: Counter[tuple[str, str]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if is_recurrent(func):
            call = parse_call(func, args, kwargs)
            result = func(*args, **kwargs)
            finals = () if call.bidirectional else finals_of(call, result)
            self._seen.calls.append(replace(call, path=self._paths.current, final=finals))
            return result
        name = getattr(func, "__name__", "")
        if name in LOOKBACK:
            self._look_back(LOOKBACK[name], args, kwargs)
        elif name == "_pack_padded_sequence":
            self._seen.packed_lengths.append(args[1].clone())
        elif name == "sort" and args[0].dim() == 1 and not args[0].is_floating_point() and len(args) == 1:
            # The order of equal lengths must not change the rows of final states.
            return torch.sort(args[0], stable=True, **kwargs)
        result = func(*args, **kwargs)
        if name in {"__getitem__", "narrow"} and isinstance(result, Tensor):
            self._uncut[id(result)] = args[0]
            self._slices.append(result)
        return result

    def _look_back(self, operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        key = (operator, self._paths.current)
        self._seen.lookbacks.append(LookbackCall(operator, key[1], self._ordinals[key], args, kwargs, self._uncut))
        self._ordinals[key] += 1
