"""What `conveyor export` is told by name: the module, its weights, its example.

Invariant: whatever the user's code or files do, the answer is an ExportError that names them; weights are never
unpickled beyond tensors.
"""

import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conveyor_export.errors import ExportError

_SHOWN = 5


def load_module(target: str, weights: str | None, weights_key: str | None) -> tuple[nn.Module, Any]:
    """The module of `package.module:factory` with its weights, or of a `.pt2` file with its example inputs.

    Returns:
        The module, and the example inputs that a `.pt2` file brings; None without.

    Raises:
        ExportError: something cannot be imported, called, read or loaded; CaptureError for a `.pt2` file whose
            recurrent calls are gone.
    """
    if target.endswith(".pt2"):
        if weights is not None:
            raise ExportError(f"{target} brings its weights: --weights goes with MODULE:FACTORY only")
        from conveyor_export.pt2 import load_pt2

        return load_pt2(Path(target))
    module = _made(_resolve(target, "the model"), target)
    if not isinstance(module, nn.Module):
        raise ExportError(f"{target} gave a {type(module).__name__}, not a torch.nn.Module")
    if weights is not None:
        _load_weights(module, Path(weights), weights_key)
    return module, None


def load_example(target: str | None, own: Any) -> Any:
    """The example inputs of `package.module:name`, called when it is callable; `own` when none is named."""
    if target is None:
        if own is None:
            raise ExportError("an example is needed: --example MODULE:NAME, one batch of inputs as forward takes it")
        return own
    return _made(_resolve(target, "the example"), target)


def _resolve(target: str, what: str) -> Any:
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ExportError(f"{target!r} does not name {what}: write MODULE:NAME, such as my_package.models:Tagger")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ExportError(f"cannot import {module_name!r} from {folder}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ExportError(f"{module_name} has no {attribute!r} (asked for {target})") from error
    return found


def _made(found: Any, target: str) -> Any:
    """The result of a factory; anything that is not one, and a module, which is callable too, is itself the result."""
    if not callable(found) or isinstance(found, nn.Module):
        return found
    try:
        return found()
    except Exception as error:
        raise ExportError(f"{target}() raised {type(error).__name__}: {error}") from error


def _load_weights(module: nn.Module, file: Path, key: str | None) -> None:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{file} holds more than tensors, and code in a file is not run: save it again with "
            "torch.save(module.state_dict(), FILE)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ExportError(f"cannot read the weights {file}: {reason}") from error
    if key is not None:
        if not isinstance(state, Mapping) or key not in state:
            raise ExportError(f"{file} has no entry {key!r}; it has {_entries(state)}")
        state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ExportError(
            f"{file} is not a state_dict; it has {_entries(state)}. If one of them is the state_dict, name it with "
            "--weights-key"
        )
    _fit(module, state, file)


def _fit(module: nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> None:
    own = module.state_dict()
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [
        f"{key}: {list(state[key].shape)} in the file, {list(own[key].shape)} in the module"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (("missing in the file", missing), ("not in the module", unexpected), ("shapes", shapes))
        if names
    ]
    if problems:
        prefix = next((p for p in ("module.", "_orig_mod.") if all(key.startswith(p) for key in state)), "")
        hint = f"\n  every name begins with {prefix!r}: save the state_dict of the wrapped module" if prefix else ""
        raise ExportError(f"{file} does not fit the module\n  " + "\n  ".join(problems) + hint)
    module.load_state_dict(state)


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _entries(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"entries {_some([str(key) for key in state])}"
    return f"a {type(state).__name__}"
