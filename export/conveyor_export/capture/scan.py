"""Scan form: the step graph of one time step, wrapped into one ONNX Scan over time.

Rows whose length has passed keep their state: every state goes through `Where(step < lengths, new, old)`.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from conveyor_proto.codec import to_numpy_dtype
from conveyor_proto.v1 import spec_pb2
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from conveyor_export.capture.describe import LENGTHS
from conveyor_export.capture.graph import name_ports, rename_values, value_info

_STEP = "step"
_INNER = "step."


def wrap(
    step: GraphProto, spec: spec_pb2.ModelSpec, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
) -> GraphProto:
    """The graph over whole chunks.

    Args:
        step: inputs `[batch, *row]` then states; outputs `[batch, *row]` then new states, in the order of `spec`.
        spec: inputs, outputs and states.
        inputs: ports of the graph over chunks.
        outputs: likewise.
    """
    body = _Body(step, spec)
    nodes, initializers = body.outer_nodes, [*step.initializer, *body.outer_initializers]
    del step.initializer[:]
    lasts = [item.name for item in spec.outputs if not item.has_time]
    timed_inputs = [item.name for item in spec.inputs if item.has_time]
    timed_outputs = [item.name for item in spec.outputs if item.has_time]
    scan = helper.make_node(
        "Scan",
        [
            f"{_STEP}.zero",
            *(state.input_name for state in spec.states),
            *(f"{name}.zero" for name in lasts),
            *timed_inputs,
        ],
        [f"{_STEP}.count", *(state.output_name for state in spec.states), *lasts, *timed_outputs],
        name="scan",
        body=body.graph,
        num_scan_inputs=len(timed_inputs),
        scan_input_axes=[1] * len(timed_inputs),
        scan_output_axes=[1] * len(timed_outputs),
    )
    return helper.make_graph([*nodes, scan], spec.name, list(inputs), list(outputs), initializer=initializers)


class _Body:
    """The Scan's body around the step graph, and what it needs outside."""

    def __init__(self, step: GraphProto, spec: spec_pb2.ModelSpec) -> None:
        self.outer_nodes: list[NodeProto] = []
        self.outer_initializers: list[TensorProto] = [numpy_helper.from_array(np.array(0, np.int32), f"{_STEP}.zero")]
        self._step = step
        self._spec = spec
        self._nodes: list[NodeProto] = []
        self._active: dict[int, str] = {}
        self.graph = self._make()

    def _make(self) -> GraphProto:
        spec, step = self._spec, self._step
        self._name_step()
        self._nodes = list(step.node)
        one = numpy_helper.from_array(np.array(1, np.int32), f"{_STEP}.one")
        self.outer_initializers.append(one)
        self._nodes += [
            helper.make_node("Add", [_STEP, one.name], [f"{_INNER}next"], name="step.next"),
            helper.make_node("Less", [_STEP, LENGTHS], [f"{_INNER}active"], name="step.active"),
        ]
        self._active[1] = f"{_INNER}active"
        counter = helper.make_tensor_value_info(_STEP, TensorProto.INT32, [])
        inputs, outputs = [counter], [helper.make_tensor_value_info(f"{_INNER}next", TensorProto.INT32, [])]
        for state in spec.states:
            inputs.append(value_info(f"{_INNER}{state.input_name}", state.dtype, state.shape))
            kept = self._keep(f"{_INNER}{state.output_name}", f"{_INNER}{state.input_name}", len(state.shape) + 1)
            outputs.append(value_info(kept, state.dtype, state.shape))
        for item in spec.outputs:
            if not item.has_time:
                previous = f"{_INNER}{item.name}.previous"
                inputs.append(value_info(previous, item.dtype, item.shape))
                kept = self._keep(f"{_INNER}{item.name}", previous, len(item.shape) + 1)
                outputs.append(value_info(kept, item.dtype, item.shape))
                self._zero(item)
        inputs += [value_info(f"{_INNER}{item.name}", item.dtype, item.shape) for item in spec.inputs if item.has_time]
        outputs += [
            value_info(f"{_INNER}{item.name}", item.dtype, item.shape) for item in spec.outputs if item.has_time
        ]
        return helper.make_graph(self._nodes, _STEP, inputs, outputs)

    def _name_step(self) -> None:
        """Names the step graph's ports; an input without time is the outer one itself, and inner values keep apart."""
        spec, step = self._spec, self._step
        inner = {name: f"{_INNER}value.{name}" for node in step.node for name in node.output if name}
        rename_values(step, inner)
        inputs = [
            value_info(f"{_INNER}{item.name}" if item.has_time else item.name, item.dtype, item.shape)
            for item in spec.inputs
        ]
        inputs += [value_info(f"{_INNER}{state.input_name}", state.dtype, state.shape) for state in spec.states]
        outputs = [value_info(f"{_INNER}{item.name}", item.dtype, item.shape) for item in spec.outputs]
        outputs += [value_info(f"{_INNER}{state.output_name}", state.dtype, state.shape) for state in spec.states]
        name_ports(step, inputs, outputs)

    def _keep(self, new: str, old: str, rank: int) -> str:
        """The new value in rows that still have steps, the old one in the others."""
        if rank not in self._active:
            axes = numpy_helper.from_array(np.arange(1, rank, dtype=np.int64), f"{_STEP}.axes.{rank}")
            self.outer_initializers.append(axes)
            self._active[rank] = f"{_INNER}active.{rank}"
            node = helper.make_node(
                "Unsqueeze", [self._active[1], axes.name], [self._active[rank]], name=f"step.active.{rank}"
            )
            self._nodes.append(node)
        kept = f"{new}.kept"
        self._nodes.append(helper.make_node("Where", [self._active[rank], new, old], [kept], name=kept))
        return kept

    def _zero(self, item: spec_pb2.TensorSpec) -> None:
        """Zeros `[batch, *shape]` outside of the Scan: what an output without time is before the first step."""
        row = numpy_helper.from_array(np.array(item.shape, np.int64), f"{item.name}.row")
        self.outer_initializers.append(row)
        dtype = helper.np_dtype_to_tensor_dtype(to_numpy_dtype(item.dtype))
        zero = helper.make_tensor("value", dtype, [1], [0])
        rows, shape = f"{item.name}.rows", f"{item.name}.shape"
        self.outer_nodes += [
            helper.make_node("Shape", [LENGTHS], [rows], name=rows),
            helper.make_node("Concat", [rows, row.name], [shape], name=shape, axis=0),
            helper.make_node("ConstantOfShape", [shape], [f"{item.name}.zero"], name=f"{item.name}.zero", value=zero),
        ]


def has_scan(graph: onnx.GraphProto) -> bool:
    """True where a layer runs inside a Scan."""
    return any(node.op_type == "Scan" for node in graph.node)
