"""A `.pt2` file that torch.export.save wrote, as a module that capture can watch.

Invariant: the loaded module computes what the file says, through the same functions of torch that the original module
called; only sizes that torch.export froze in passing are free again.

torch.export fixes the time axis of every recurrent call, whatever it is asked for, and the batch unless it is asked
not to. The recurrent call itself is the same for every size, so the file's claim is dropped here and the verifier
finds out whether any other operation holds a frozen size.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.unflatten import UnflattenedModule, unflatten
from torch.utils import _pytree as pytree

from conveyor_export.errors import CaptureError, ExportError

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_aten = torch.ops.aten

# ATen overload -> the function of torch with the same arguments: capture watches these, and they take any sizes.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(_aten, name).input: getattr(torch, name) for name in _RECURRENT},
    **{getattr(_aten, f"{name}_cell").default: getattr(torch, f"{name}_cell") for name in _RECURRENT},
    _aten.conv1d.default: torch.conv1d,
    _aten.conv1d.padding: torch.conv1d,
    _aten.conv2d.default: torch.conv2d,
    _aten.conv2d.padding: torch.conv2d,
    _aten.constant_pad_nd.default: torch.constant_pad_nd,
    _aten.pad.default: nn.functional.pad,
    _aten.cat.default: torch.cat,
}
_SEQUENCES = {getattr(_aten, name).input for name in _RECURRENT}
_CELLS = {getattr(_aten, f"{name}_cell").default for name in _RECURRENT}
# These take no value from their input.
_FACTORIES = {
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.sym_size.int,
}


def load_pt2(file: Path) -> tuple[nn.Module, Any]:
    """The module in a `.pt2` file and its example inputs, as `export` takes them.

    Returns:
        The module, with the submodules and parameter names of the original; and the example: a tuple of positional
        arguments, or a dict where the example had keyword arguments. None where the file has none.

    Raises:
        ExportError: the file cannot be read.
        CaptureError: its recurrent calls are gone; the message says what to save instead.
    """
    try:
        with _quiet():
            program = torch.export.load(file)
    except Exception as error:  # zip, pickle, schema and version errors all come as they are
        raise ExportError(f"{file} cannot be read as a torch.export file: {type(error).__name__}: {error}") from error
    return from_program(program), _example(program)


def from_program(program: ExportedProgram) -> nn.Module:
    """A module that calls torch's own recurrent functions where the program has their operators.

    Raises:
        CaptureError: the program has none, though it was made of recurrent modules.
    """
    graph = program.graph
    _check_recurrent(graph)
    user_inputs = frozenset(program.graph_signature.user_inputs)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _SEQUENCES | _CELLS:
            _free_batch(graph, node, user_inputs)
        node.target = _FUNCTIONS.get(node.target, node.target)
    with _quiet():
        module = unflatten(program)
    module.check_input_constraints = False
    return _with_signature(module, program)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings to itself: its export code still calls what it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _check_recurrent(graph: fx.Graph) -> None:
    """Refuses a program whose recurrent calls are gone, or are those of the example's sizes alone."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    cells = [(node.target, *node.args[2:]) for node in calls if node.target in _CELLS]
    unrolled = [node for node in calls if cells.count((node.target, *node.args[2:])) > 1]
    if unrolled:
        raise CaptureError(
            f"its loop over time is unrolled in this file into {len(unrolled)} calls of a cell, the time steps of the "
            "example",
            path=_path(unrolled[0]),
            advice="Give MODULE:FACTORY and --weights",
        )
    if any(node.target in _SEQUENCES | _CELLS for node in calls):
        return
    gone = sorted({f"{path or 'the module'} ({kind.rpartition('.')[2]})" for path, kind in _recurrent_modules(graph)})
    if gone:
        raise CaptureError(
            f"the recurrent calls of {', '.join(gone)} are no longer in this file: it was decomposed into elementary "
            "operations (run_decompositions), which are unrolled over the example's time steps",
            advice="Save the program as torch.export.export returns it, or give MODULE:FACTORY and --weights",
        )


def _path(node: fx.Node) -> str:
    """The submodule that a call was made in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _recurrent_modules(graph: fx.Graph) -> Iterable[tuple[str, str]]:
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            if name.startswith("torch.nn.modules.rnn."):
                yield path, name


def _free_batch(graph: fx.Graph, call: fx.Node, user_inputs: frozenset[Any]) -> None:
    """Lets the initial states of a recurrent call follow the batch of its input, where they were frozen to a number."""
    sequence, initial = call.args[0], call.args[1]
    if not isinstance(sequence, fx.Node) or sequence.meta["val"].dim() != (3 if call.target in _SEQUENCES else 2):
        return  # one row without a batch axis
    axis = 0 if call.target not in _SEQUENCES or call.args[-1] is True else 1
    for state in initial if isinstance(initial, list | tuple) else [initial]:
        if not isinstance(state, fx.Node):
            continue
        frozen = isinstance(state.meta["val"].shape[-2], int) and not _depends_on(state, user_inputs)
        with graph.inserting_before(call):
            followed = graph.call_function(initial_state, (state, sequence, axis, frozen))
        followed.meta |= {**call.meta, "val": state.meta["val"]}
        call.replace_input_with(state, followed)


def _depends_on(node: fx.Node, inputs: frozenset[Any]) -> bool:
    """Whether a value depends on what the user gives, more than by its shape or type."""
    if node.op == "placeholder":
        return node.name in inputs
    return node.target not in _FACTORIES and any(_depends_on(source, inputs) for source in node.all_input_nodes)


def initial_state(state: torch.Tensor, sequence: torch.Tensor, axis: int, frozen: bool) -> torch.Tensor:
    """The state that a recurrent call starts from, for as many rows as its input has now.

    torch's recurrent functions do not compare the two as `nn.LSTM` does: they read beyond the end of a state that is
    too small. So nothing reaches them unchecked.

    Args:
        state: `[layers, batch, size]` or `[batch, size]`.
        sequence: the call's input.
        axis: of the batch in `sequence`.
        frozen: the state is the same for any input, and was written for the example's batch.

    Raises:
        RuntimeError: the state has another batch than the input, or rows that differ.
    """
    batch = sequence.shape[axis]
    row = state.narrow(-2, 0, 1)
    if torch.compiler.is_exporting():
        return row.expand(*state.shape[:-2], batch, state.shape[-1]) if frozen else state
    if state.shape[-2] == batch:
        return state
    if not frozen or not torch.equal(row.expand_as(state), state):
        raise RuntimeError(f"an initial state has {state.shape[-2]} rows and the input {batch}")
    return row.expand(*state.shape[:-2], batch, state.shape[-1]).contiguous()


def _with_signature(module: UnflattenedModule, program: ExportedProgram) -> nn.Module:
    """The module with forward's parameter names and the name of its class, which unflattening forgets."""
    args, kwargs = program.call_spec.in_spec.unflatten(range(program.call_spec.in_spec.num_leaves))
    names = _parameter_names(program, len(args))
    kinds = inspect.Parameter
    parameters = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    parameters += [kinds(name, kinds.KEYWORD_ONLY) for name in kwargs]
    frozen = _shapes(program.example_inputs)

    def forward(self: UnflattenedModule, *given: Any, **keywords: Any) -> Any:
        # A positional argument may come by name; the program knows it by its place only.
        given += tuple(keywords.pop(name) for name in names[len(given) :])
        try:
            return UnflattenedModule.forward(self, *given, **keywords)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if torch.compiler.is_exporting() or _shapes((given, keywords)) == frozen:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"the .pt2 file holds sizes of the example that it was exported with, {frozen}: {first}. Export it "
                "again with dynamic_shapes={...: {0: torch.export.Dim.AUTO}} for the batch, and with no size of the "
                "time axis in forward() outside recurrent calls, such as reshape(batch, time, -1)"
            ) from error

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    package, _, name = (module.type_name() or "Module").rpartition(".")
    module.__class__ = type(name, (UnflattenedModule,), {"forward": forward, "__module__": package or __name__})
    return module


def _parameter_names(program: ExportedProgram, count: int) -> list[str]:
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature is not None else None) or []
    return [names[index] if index < len(names) else f"input_{index}" for index in range(count)]


def _shapes(inputs: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _example(program: ExportedProgram) -> Any:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    if not kwargs:
        return tuple(args)
    return dict(zip(_parameter_names(program, len(args)), args, strict=True)) | dict(kwargs)
