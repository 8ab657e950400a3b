"""Which submodule is running: a stack of module paths, kept by global hooks so that the module itself gets none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModulePaths:
    """The path of the submodule of `root` that runs now; after an exception, of the one that raised."""

    def __init__(self, root: nn.Module) -> None:
        self._names = {id(module): name for name, module in root.named_modules()}
        self._stack: list[str] = []
        self._thread = threading.get_ident()

    @property
    def current(self) -> str:
        """Module path of the innermost running submodule, empty for the root."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follows the calls made in this thread until it ends."""
        self._stack.clear()
        handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if id(module) in self._names and threading.get_ident() == self._thread:
            self._stack.append(self._names[id(module)])

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if id(module) in self._names and threading.get_ident() == self._thread:
            self._stack.pop()
