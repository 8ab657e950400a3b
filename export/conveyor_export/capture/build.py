"""From a plan to a StepModel, in sequence form: every recurrent layer is one operator over the whole chunk."""

from collections.abc import Sequence

from conveyor_proto.v1 import spec_pb2, tensor_pb2
from onnx import GraphProto, ValueInfoProto
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from conveyor_export.capture.context import Context, name_contexts, observed_contexts
from conveyor_export.capture.describe import IR_VERSION, LENGTHS, add_state, complete, describe
from conveyor_export.capture.emit import emit
from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.facts import TimeSymbol
from conveyor_export.capture.graph import make_model, name_ports, value_info
from conveyor_export.capture.guards import check_guards, check_symbolic
from conveyor_export.capture.layers import OPSET
from conveyor_export.capture.layout import BATCH
from conveyor_export.capture.plan import Plan, no_state
from conveyor_export.capture.reference import example_arrays, make_reference
from conveyor_export.capture.rewrite import Rewrites, RewrittenGraph, contexts_of
from conveyor_export.capture.scan import has_scan, wrap
from conveyor_export.capture.timewalk import TimeWalk
from conveyor_export.capture.trace import StepGraph, export_graph, same_sizes, timed_inputs, trace, trace_arguments
from conveyor_export.step_model import StepModel


def build_sequence(plan: Plan, *, allow_non_finite_inputs: bool) -> StepModel:
    """Traces the plan's module and writes the step graph.

    Raises:
        CaptureError: the trace shows that the module cannot be streamed.
    """
    spec = describe(plan, allow_non_finite_inputs=allow_non_finite_inputs)
    stepper = StepGraph(plan)
    program = trace(plan, stepper)
    program, contexts, order = _stream(plan, program)
    if not contexts and not plan.layer_states:
        raise no_state(plan)
    graph = emit(program, stepper.constant_names)
    spec.lengths_input = LENGTHS
    for context in contexts:
        add_state(spec, context.name, context.row, spec_pb2.STATE_ROLE_CONTEXT, context.look_back.path)
    name_ports(graph, *ports(spec))
    _sort_states(graph, spec, order)
    graph.name = plan.name
    layers = [layer.spec("" if layer.p is not None else layer.path) for layer in stepper.layers.values()]
    complete(spec, graph, layers, "scan" if has_scan(graph) else "sequence")
    model = make_model(graph, OPSET, IR_VERSION)
    reference = make_reference(plan, lambda observation: observed_contexts(contexts, observation))
    return StepModel(model, spec, reference, example_arrays(plan))


def build_scan(plan: Plan, *, allow_non_finite_inputs: bool) -> StepModel:
    """Traces one time step of the plan's module and wraps it into a Scan.

    Raises:
        CaptureError: the trace shows that the module cannot be streamed.
    """
    spec = describe(plan, allow_non_finite_inputs=allow_non_finite_inputs)
    stepper = StepGraph(plan)
    program = trace(plan, stepper)
    sizes = [
        node.meta["val"].shape[0] for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0]
    ]
    check_symbolic(sizes[0], None)
    check_guards(sizes[0], None)
    step = emit(program, stepper.constant_names)
    spec.lengths_input = LENGTHS
    graph = wrap(step, spec, *ports(spec))
    complete(spec, graph, [layer.spec("") for layer in stepper.layers.values()], "scan")
    model = make_model(graph, OPSET, IR_VERSION)
    return StepModel(model, spec, make_reference(plan, lambda _: {}), example_arrays(plan))


def ports(spec: spec_pb2.ModelSpec) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Graph inputs and outputs of a spec, in the order of StepGraph."""
    inputs = [value_info(item.name, item.dtype, item.shape, timed=item.has_time) for item in spec.inputs]
    inputs.append(value_info(LENGTHS, tensor_pb2.DATA_TYPE_INT32, ()))
    inputs += [value_info(state.input_name, state.dtype, state.shape) for state in spec.states]
    outputs = [value_info(item.name, item.dtype, item.shape, timed=item.has_time) for item in spec.outputs]
    outputs += [value_info(state.output_name, state.dtype, state.shape) for state in spec.states]
    return inputs, outputs


def _stream(plan: Plan, program: ExportedProgram) -> tuple[ExportedProgram, list[Context], list[str]]:
    """Follows time through the trace; traces again where something must be computed otherwise.

    Also returns the layers and contexts, by path and by name, as they run.
    """
    graph = program.module(check_guards=False)
    rewrites, order = _walk(plan, graph)
    if not rewrites:
        return program, [], order
    nodes = contexts_of(rewrites)
    contexts = name_contexts([item for _, item in nodes], type(plan.module).__name__.lower())
    names = {node: context.name for (node, _), context in zip(nodes, contexts, strict=True)}
    return _retrace(plan, graph, rewrites, contexts), contexts, [names.get(item, item) for item in order]


def _sort_states(graph: GraphProto, spec: spec_pb2.ModelSpec, order: Sequence[str]) -> None:
    """Puts the states, and their graph inputs and outputs, in the order in which the layers run."""
    place = {name: index for index, name in enumerate(order)}
    states = sorted(spec.states, key=lambda state: place.get(state.layer, place.get(state.name, len(place))))
    del spec.states[:]
    spec.states.extend(states)
    inputs, outputs = ports(spec)
    del graph.input[:], graph.output[:]
    graph.input.extend(inputs)
    graph.output.extend(outputs)


def _walk(plan: Plan, graph: GraphModule) -> tuple[Rewrites, list[str]]:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    timed = next(index for index, name in enumerate(plan.inputs) if plan.layout.axes[name].time is not None)
    batch, time = placeholders[timed].meta["val"].shape[:2]
    check_symbolic(batch, time)
    lengths = placeholders[len(plan.inputs)].name
    walk = TimeWalk(graph, TimeSymbol(time, batch), lengths, [item.name for item in plan.outputs])
    rewrites = walk.run()
    check_guards(batch, time)
    for item in plan.outputs:
        if item.leaf.problem:
            raise CaptureError(item.leaf.problem, advice="Return one value for each time step, or the last one")
    return rewrites, walk.order


def _retrace(plan: Plan, graph: GraphModule, rewrites: Rewrites, contexts: Sequence[Context]) -> ExportedProgram:
    args, dynamic = trace_arguments(plan)
    rows = {0: Dim.DYNAMIC}
    values = tuple(context.row.expand(BATCH, *context.row.shape).clone() for context in contexts)
    whole = (*args, values)
    rewritten = RewrittenGraph(graph, rewrites, lambda inputs, others: same_sizes(inputs, timed_inputs(plan), others))
    return export_graph(rewritten, whole, (*dynamic, tuple(rows for _ in contexts)))
