"""A projected LSTM (`proj_size`) as a Scan: ONNX's LSTM operator has no projection.

The input's share of the gates is one matrix product over all time steps; only the recurrence is inside the Scan.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from conveyor_export.capture.layers import PROJECTED

_Weights = Mapping[str, NDArray[np.float32]]


def expand_projections(graph: GraphProto) -> None:
    """Replaces every projected LSTM in the graph."""
    operator = PROJECTED.rpartition(":")[2]
    if not any(node.op_type == operator for node in graph.node):
        return
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == operator:
            made, constants = _expand(node, values)
            nodes += made
            present = {item.name for item in graph.initializer}
            graph.initializer.extend(item for item in constants if item.name not in present)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    used |= {
        name
        for node in graph.node
        for attribute in node.attribute
        for inner in attribute.g.node
        for name in inner.input
    }
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _expand(node: NodeProto, values: _Weights) -> tuple[list[NodeProto], list[TensorProto]]:
    x, w, r, b, lengths, h0, c0, p = node.input
    y, y_h, y_c = [*node.output, "", ""][:3]
    path = node.name
    wt, rt, pt = values[w][0].T, values[r][0].T, values[p].T
    names = {part: f"{name}.transposed" for part, name in (("w", w), ("r", r), ("p", p))}
    constants = {names["w"]: wt, names["r"]: rt, names["p"]: pt}
    constants |= {f"{path}.axis.0": np.array([0], np.int64), f"{path}.axis.1": np.array([1], np.int64)}
    constants |= {f"{path}.start": np.array(0, np.int32), f"{path}.one": np.array(1, np.int32)}
    gates = [f"{path}.gates.product" if b else f"{path}.gates"]
    nodes = [helper.make_node("MatMul", [x, names["w"]], gates, name=f"{path}.gates.product")]
    if b:
        constants[f"{b}.sum"] = values[b].reshape(2, -1).sum(axis=0)
        nodes.append(helper.make_node("Add", [gates[0], f"{b}.sum"], [f"{path}.gates"], name=f"{path}.gates"))
    nodes += [
        helper.make_node("Squeeze", [h0, f"{path}.axis.0"], [f"{path}.h0"], name=f"{path}.h0"),
        helper.make_node("Squeeze", [c0, f"{path}.axis.0"], [f"{path}.c0"], name=f"{path}.c0"),
        helper.make_node(
            "Scan",
            [f"{path}.start", f"{path}.h0", f"{path}.c0", f"{path}.gates"],
            [f"{path}.count", f"{path}.h", f"{path}.c", f"{path}.y"],
            name=path,
            body=_body(path, names, lengths, rt.shape, pt.shape[0]),
            num_scan_inputs=1,
        ),
    ]
    for value, output, axis in ((f"{path}.y", y, 1), (f"{path}.h", y_h, 0), (f"{path}.c", y_c, 0)):
        if output:
            nodes.append(helper.make_node("Unsqueeze", [value, f"{path}.axis.{axis}"], [output], name=f"{output}.axis"))
    made = [numpy_helper.from_array(np.array(value, order="C"), name) for name, value in constants.items()]
    return nodes, made


def _body(path: str, names: Mapping[str, str], lengths: str, recurrent: tuple[int, ...], hidden: int) -> GraphProto:
    """One time step; ONNX's gate order i, o, f, c."""

    def value(name: str) -> str:
        return f"{path}.step.{name}"

    def node(operator: str, inputs: list[str], output: str) -> NodeProto:
        return helper.make_node(
            operator,
            [item if "." in item else value(item) for item in inputs],
            [value(output)],
            name=value(output),
        )

    split = helper.make_node(
        "Split", [value("gates")], [value(gate) for gate in "iofg"], name=value("split"), axis=1, num_outputs=4
    )
    nodes = [
        node("MatMul", ["h", names["r"]], "recurrent"),
        node("Add", ["x", "recurrent"], "gates"),
        split,
        *(node("Sigmoid", [gate], f"{gate}_on") for gate in "iof"),
        node("Tanh", ["g"], "g_on"),
        node("Mul", ["f_on", "c"], "kept_c"),
        node("Mul", ["i_on", "g_on"], "added_c"),
        node("Add", ["kept_c", "added_c"], "new_c"),
        node("Tanh", ["new_c"], "squashed"),
        node("Mul", ["o_on", "squashed"], "full_h"),
        node("MatMul", ["full_h", names["p"]], "new_h"),
        node("Add", ["t", f"{path}.one"], "next_t"),
    ]
    h, c = "new_h", "new_c"
    if lengths:
        # The name of a graph input without a dot is an outer value, not one of the body's.
        less = helper.make_node("Less", [value("t"), lengths], [value("active")], name=value("active"))
        nodes += [
            less,
            node("Unsqueeze", ["active", f"{path}.axis.1"], "active_rows"),
            node("Where", ["active_rows", "new_h", "h"], "next_h"),
            node("Where", ["active_rows", "new_c", "c"], "next_c"),
        ]
        h, c = "next_h", "next_c"
    nodes.append(node("Identity", ["new_h"], "y"))
    projected, gates = recurrent
    rows = "batch"
    floats = [("h", projected), ("c", hidden), ("x", gates)]
    inputs = [helper.make_tensor_value_info(value("t"), TensorProto.INT32, [])]
    inputs += [helper.make_tensor_value_info(value(name), TensorProto.FLOAT, [rows, size]) for name, size in floats]
    outputs = [helper.make_tensor_value_info(value("next_t"), TensorProto.INT32, [])]
    for name, size in ((h, projected), (c, hidden), ("y", projected)):
        outputs.append(helper.make_tensor_value_info(value(name), TensorProto.FLOAT, [rows, size]))
    return helper.make_graph(nodes, value("body"), inputs, outputs)
