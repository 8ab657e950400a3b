"""Runs a module without leaving a trace in it: whatever happens inside, it comes out as it went in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, a random generator of its own; restores attributes, buffers and training flags.

    Calls come from one thread at a time per module. Attributes that hold plain lists, dicts or sets are restored one
    level deep, so that a module that keeps a history of its own gets it back.
    """
    saved = [_Saved(part) for part in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module.eval()
            yield
    finally:
        for part in saved:
            part.restore()


class _Saved:
    """What one module was."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        self._containers: list[tuple[Any, Any]] = [
            (value, value.copy())
            for name, value in module.__dict__.items()
            if type(value) in {list, dict, set} or name in _REGISTRIES
        ]
        self._buffers = [
            (buffer, buffer._version, buffer.clone()) for buffer in module._buffers.values() if buffer is not None
        ]

    def restore(self) -> None:
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        for buffer, version, content in self._buffers:
            if buffer._version != version:
                buffer.copy_(content)
