"""From an exported program to an ONNX graph with weights as constants and names that mean something."""

from collections import Counter
from collections.abc import Mapping

import torch
from onnx import GraphProto
from onnx.inliner import inline_local_functions
from torch.export import ExportedProgram

from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.graph import rename_values, strip
from conveyor_export.capture.layers import LAYER_KEY, OPSET
from conveyor_export.capture.projection import expand_projections
from conveyor_export.capture.quiet import quiet


def emit(program: ExportedProgram, constants: Mapping[str, str]) -> GraphProto:
    """The program as an ONNX graph; recurrent nodes are named after their layers.

    Args:
        program: what `trace` made.
        constants: initializer names by the name of the traced buffer.

    Raises:
        CaptureError: an operator has no ONNX form.
    """
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:
        text = str(error.__cause__ or error).strip()
        lines = [line for line in text.splitlines() if line.strip()]
        raise CaptureError(
            f"torch.onnx cannot write it as ONNX: {lines[0] if lines else type(error).__name__}",
            advice="Replace the operator that it names by one that ONNX has",
        ) from error
    if made is None:
        raise CaptureError("torch.onnx wrote nothing")
    model = inline_local_functions(made.model_proto)
    graph = model.graph
    seen: Counter[str] = Counter()
    for node in graph.node:
        for item in node.metadata_props:
            if item.key == LAYER_KEY:
                seen[item.value] += 1
                node.name = item.value + (f"~{seen[item.value]}" if seen[item.value] > 1 else "")
    strip(graph)
    expand_projections(graph)
    rename_values(graph, _initializer_names(graph, constants))
    return graph


def _initializer_names(graph: GraphProto, constants: Mapping[str, str]) -> dict[str, str]:
    """`lstm.0.W` for recurrent weights, the user's own parameter names for the others."""
    names = {}
    for initializer in graph.initializer:
        # A second trace holds the first as its submodule `traced`.
        name = initializer.name.removeprefix("traced.")
        if name in constants:
            names[initializer.name] = constants[name]
        elif name.startswith("module."):
            names[initializer.name] = name.removeprefix("module.")
    taken = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    return {old: new for old, new in names.items() if new not in taken}
