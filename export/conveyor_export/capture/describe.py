"""The ModelSpec of a plan: inputs, outputs, states, layers, provenance."""

import datetime
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import onnx
import torch
from conveyor_proto.codec import to_data_type
from conveyor_proto.spec import SPEC_VERSION, check_spec, state_row_bytes
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from torch import Tensor

from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.graph import operation_counts
from conveyor_export.capture.layers import OPSET
from conveyor_export.capture.layout import Pace
from conveyor_export.capture.plan import ROLES, Plan

IR_VERSION = 10
LENGTHS = "lengths"


def describe(plan: Plan, *, allow_non_finite_inputs: bool = False) -> spec_pb2.ModelSpec:
    """Inputs, outputs, states and provenance; layers, operations and contexts come with the graph.

    Raises:
        CaptureError: an input or output has a dtype that the wire cannot carry.
    """
    spec = spec_pb2.ModelSpec(
        spec_version=SPEC_VERSION, name=plan.name, allow_non_finite_inputs=allow_non_finite_inputs
    )
    single = plan.layout.pace is Pace.SINGLE
    for name in plan.inputs:
        leaf = next(leaf for leaf in plan.signature.leaves if leaf.name == name)
        axes = plan.layout.axes[name]
        item = spec.inputs.add(name=plan.input_names[name], dtype=data_type(name, leaf.value.dtype))
        item.shape.extend(axes.row(tuple(leaf.value.shape)))
        item.has_time = single or axes.time is not None
    for output in plan.outputs:
        item = spec.outputs.add(name=output.name, dtype=data_type(output.name, output.leaf.dtype))
        item.shape.extend(output.leaf.axes.row(output.leaf.shape))
        item.has_time = output.leaf.has_time
    for state in plan.layer_states:
        add_state(spec, state.name, state.initial, ROLES[state.role], state.layer_path)
    for custom in plan.custom_states:
        add_state(spec, custom.name, custom.initial, spec_pb2.STATE_ROLE_CUSTOM, "")
    spec.provenance.CopyFrom(_provenance(plan))
    return spec


def add_state(
    spec: spec_pb2.ModelSpec, name: str, initial: Tensor, role: spec_pb2.StateRole.ValueType, layer: str
) -> spec_pb2.StateSpec:
    """Appends a state; its graph names are `<name>` and `<name>.next` unless a user's tensor has them."""
    taken = {item.name for item in [*spec.inputs, *spec.outputs]} | {state.name for state in spec.states}
    while name in taken or f"{name}.next" in taken:
        name = f"{name}.state"
    state = spec.states.add(name=name, input_name=name, output_name=f"{name}.next", role=role, layer=layer)
    state.dtype = data_type(name, initial.dtype)
    state.shape.extend(initial.shape)
    row = initial.detach().contiguous().numpy()
    if np.any(row.view(np.uint8) if row.ndim else row):
        state.initial = row.tobytes()
    return state


def complete(spec: spec_pb2.ModelSpec, graph: onnx.GraphProto, layers: Sequence[spec_pb2.LayerSpec], form: str) -> None:
    """Fills in what only the finished graph tells, and checks the whole."""
    spec.layers.extend(layers)
    for operator, count in operation_counts(graph).items():
        spec.operations[operator] = count
    spec.provenance.form = form
    spec.state_bytes = sum(map(state_row_bytes, spec.states))
    check_spec(spec)


def data_type(name: str, dtype: torch.dtype) -> tensor_pb2.DataType.ValueType:
    """The DataType of a torch dtype."""
    try:
        return to_data_type(torch.empty(0, dtype=dtype).numpy().dtype)
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"{name!r} is {str(dtype).removeprefix('torch.')}, which cannot be sent",
            advice="Convert it to float32 or an integer type inside forward()",
        ) from error


def _provenance(plan: Plan) -> spec_pb2.Provenance:
    kind = type(plan.module)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return spec_pb2.Provenance(
        conveyor_version=metadata.version("conveyor"),
        torch_version=torch.__version__,
        onnx_version=onnx.__version__,
        opset=OPSET,
        ir_version=IR_VERSION,
        module=f"{kind.__module__}.{kind.__qualname__}",
        exported_at=now.isoformat().replace("+00:00", "Z"),
        parameters=sum(parameter.numel() for parameter in plan.module.parameters()),
    )
