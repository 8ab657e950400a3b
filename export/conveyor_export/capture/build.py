"""From a plan to a StepModel."""

from conveyor_proto.v1 import tensor_pb2

from conveyor_export.capture.describe import IR_VERSION, LENGTHS, complete, describe
from conveyor_export.capture.emit import emit
from conveyor_export.capture.graph import make_model, name_ports, value_info
from conveyor_export.capture.layers import OPSET
from conveyor_export.capture.plan import Plan
from conveyor_export.capture.reference import example_arrays, make_reference
from conveyor_export.capture.trace import StepGraph, trace
from conveyor_export.step_model import StepModel


def build(plan: Plan, *, allow_non_finite_inputs: bool) -> StepModel:
    """Traces the plan's module and writes the step graph.

    Raises:
        CaptureError: the trace shows that the module cannot be streamed.
    """
    spec = describe(plan, allow_non_finite_inputs=allow_non_finite_inputs)
    stepper = StepGraph(plan)
    program = trace(plan, stepper)
    graph = emit(program, stepper.constant_names)
    spec.lengths_input = LENGTHS
    inputs = [value_info(item.name, item.dtype, item.shape, timed=item.has_time) for item in spec.inputs]
    inputs.append(value_info(LENGTHS, tensor_pb2.DATA_TYPE_INT32, ()))
    inputs += [value_info(state.input_name, state.dtype, state.shape) for state in spec.states]
    outputs = [value_info(item.name, item.dtype, item.shape, timed=item.has_time) for item in spec.outputs]
    outputs += [value_info(state.output_name, state.dtype, state.shape) for state in spec.states]
    name_ports(graph, inputs, outputs)
    graph.name = plan.name
    complete(spec, graph, [layer.spec(layer.path) for layer in stepper.layers.values()], "sequence")
    model = make_model(graph, OPSET, IR_VERSION)
    return StepModel(model, spec, make_reference(plan, lambda observation, time: {}), example_arrays(plan))
