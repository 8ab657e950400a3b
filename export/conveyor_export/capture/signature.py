"""The forward signature of a module with one set of example inputs: its tensors by name, and other such calls."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from conveyor_export.capture.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor among the example inputs.

    Attributes:
        name: parameter name, with the keys inside it where it is a tuple or dict: `state.h`.
        parameter: name of the forward parameter that holds it.
        value: the example.
        listed: the user gives a list of integers, not a tensor.
    """

    name: str
    parameter: str
    value: Tensor
    listed: bool = False


class Signature:
    """The tensors of one call of `module.forward`, and how to make another such call.

    Raises:
        CaptureError: the example inputs do not fit the signature, or hold no tensor.
    """

    def __init__(self, module: nn.Module, example_inputs: Any) -> None:
        args, kwargs = _split(module, example_inputs)
        signature = inspect.signature(module.forward)
        try:
            self._bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(
                f"the example inputs do not fit forward{signature}: {error}",
                advice="Give a tensor, a tuple of positional arguments or a dict of keyword arguments",
            ) from error
        self._signature = signature
        flat, self._treespec = pytree.tree_flatten_with_path(dict(self._bound.arguments), is_leaf=_is_integers)
        self._flat: list[Any] = []
        self.leaves: list[Leaf] = []
        for keys, value in flat:
            self._flat.append(self._leaf(keys, value) if isinstance(value, Tensor) or _is_integers(value) else value)
        if not self.leaves:
            raise CaptureError("the example inputs hold no tensor", advice="Give one batch of example inputs")

    @property
    def omitted(self) -> tuple[str, ...]:
        """Parameters that the example leaves at their default None: possible states."""
        given = self._bound.arguments
        return tuple(
            name
            for name, parameter in self._signature.parameters.items()
            if parameter.default is None and given.get(name) is None
        )

    def defaults_to_none(self, parameter: str) -> bool:
        """True where the module can be called without this parameter."""
        return self._signature.parameters[parameter].default is None

    def call(self, values: Mapping[str, Tensor], *, traced: bool = False) -> tuple[Any, Any]:
        """Arguments and keyword arguments with each leaf's tensor from `values`; a trace keeps lists as tensors."""
        flat = [
            self._own(item, values[item.name], traced=traced) if isinstance(item, Leaf) else item for item in self._flat
        ]
        arguments = pytree.tree_unflatten(flat, self._treespec)
        bound = inspect.BoundArguments(self._signature, type(self._bound.arguments)(arguments))
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        skipped = False
        for name, parameter in self._signature.parameters.items():
            if name not in bound.arguments:
                skipped = skipped or parameter.kind is not parameter.VAR_POSITIONAL
            elif parameter.kind is parameter.VAR_POSITIONAL:
                positional += bound.arguments[name]
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords |= bound.arguments[name]
            elif skipped or parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = bound.arguments[name]
            else:
                positional.append(bound.arguments[name])
        return tuple(positional), keywords

    def without(self, parameters: frozenset[str]) -> dict[str, Any]:
        """Keyword example inputs with some parameters left at their default."""
        return {name: value for name, value in self._bound.arguments.items() if name not in parameters}

    def argument(self, parameter: str, values: Mapping[str, Any]) -> Any:
        """The value of one parameter, its leaves taken from `values`."""
        flat = [values.get(item.name) if isinstance(item, Leaf) else item for item in self._flat]
        return pytree.tree_unflatten(flat, self._treespec)[parameter]

    @staticmethod
    def _own(leaf: Leaf, value: Tensor, *, traced: bool) -> Any:
        return value.tolist() if leaf.listed and not traced else value

    def _leaf(self, keys: Any, value: Any) -> Leaf:
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]
        listed = not isinstance(value, Tensor)
        tensor = torch.tensor(value, dtype=torch.int64) if listed else value.detach()
        leaf = Leaf(".".join(parts), parts[0], tensor, listed)
        self.leaves.append(leaf)
        return leaf


def _split(module: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, PackedSequence) or (
        isinstance(example_inputs, tuple | list) and any(isinstance(item, PackedSequence) for item in example_inputs)
    ):
        raise CaptureError(
            "the example inputs hold a PackedSequence, which has no batch and time axis",
            advice="Give the padded tensor instead; ragged batches are handled by the step model itself",
        )
    if isinstance(example_inputs, Mapping):
        parameters = inspect.signature(module.forward).parameters
        takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if takes_keywords or set(example_inputs) <= set(parameters):
            return (), dict(example_inputs)
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _is_integers(value: Any) -> bool:
    """A list of integers is one leaf: lengths as pack_padded_sequence takes them."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
