"""An ONNX file that Conveyor did not export becomes a step model: its own graph, with rows placed in front and behind.

    [batch, time, *shape] -> Squeeze, Concat (window), Transpose -> the file's graph -> Transpose, Unsqueeze -> the same

Invariant: the file's own nodes stay as they are, down to their order; only names change. A run is one time step of each
of its rows, so no graph needs to know of lengths.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from conveyor_proto import spec as specs
from conveyor_proto.codec import Array, to_data_type
from conveyor_proto.v1 import spec_pb2
from onnx import helper, numpy_helper

from conveyor_server.runner.description import Constant
from conveyor_server.runner.fitting import Fitted, Pair
from conveyor_server.runner.layout import Layout
from conveyor_server.runner.nodes import Nodes, axes_of, names, rename

_END = np.iinfo(np.int64).max


def rewrite(proto: onnx.ModelProto, fitted: Fitted, name: str) -> tuple[onnx.ModelProto, spec_pb2.ModelSpec]:
    """The step model of a file, and its description.

    Args:
        proto: the file's own graph; it stays as it is.
        fitted: what is said of it.
        name: of the model.

    Returns:
        The graph, and a ModelSpec of its tensors and states; what else can be known of it is for `facts`.
    """
    return _Rewrite(proto, fitted).step_model(name)


class _Rewrite:
    """One step model in the making: its graph's inputs and outputs and its spec grow side by side."""

    def __init__(self, proto: onnx.ModelProto, fitted: Fitted) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(proto)
        # Before 4, what has a value in the file had to be an input too.
        self._model.ir_version = max(self._model.ir_version, 4)
        self._fitted = fitted
        self._taken = names(proto.graph)
        prefix = self._new_name("adopted")
        self._before, self._after = Nodes(f"{prefix}.before"), Nodes(f"{prefix}.after")
        # Name of a value in the file -> its name in the step model, where the two differ.
        self._renamed: dict[str, str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._weights: list[onnx.TensorProto] = []
        described = fitted.description
        self._one_row = described.batch == "one"
        self._spec = spec_pb2.ModelSpec(
            spec_version=specs.SPEC_VERSION,
            max_rows=1 if self._one_row else 0,
            min_rows=2 if described.batch == "company" else 1,
            max_time_steps_per_run=1,
            allow_non_finite_inputs=described.allow_non_finite_inputs,
        )

    def step_model(self, name: str) -> tuple[onnx.ModelProto, spec_pb2.ModelSpec]:
        """See `rewrite`."""
        fitted, graph = self._fitted, self._model.graph
        for pair in fitted.pairs:
            self._add_pair(pair)
        for start in fitted.starts:
            self._add_start(*start)
        for layout in fitted.inputs:
            self._add_input(layout)
        for layout in fitted.outputs:
            self._add_output(layout)
        for constant in fitted.description.constants:
            self._add_constant(constant)
        rename(graph, self._renamed)
        nodes = [*self._before.nodes, *graph.node, *self._after.nodes]
        del graph.node[:], graph.input[:], graph.output[:]
        graph.node.extend(nodes)
        graph.initializer.extend([*self._weights, *self._before.constants, *self._after.constants])
        graph.input.extend(self._inputs)
        graph.output.extend(self._outputs)
        self._spec.name = name
        self._spec.state_bytes = sum(map(specs.state_row_bytes, self._spec.states))
        return self._model, self._spec

    def _add_pair(self, pair: Pair) -> None:
        state, new = pair.state, pair.state.output
        if new in [item.name for item in self._fitted.description.outputs]:
            new = self._new_name(f"{new}.state")  # it is an answer too, which has a time axis
        self._add_state(state.name, state.input, new, pair.layout, pair.initial, role=pair.role, layer=pair.layer)
        self._place(state.input, state.input, pair.layout, [0] if pair.layout.batch_axis is None else [])
        self._take_out(state.output, new, pair.layout, [0] if pair.layout.batch_axis is None else [])

    def _add_start(self, layout: Layout, first: Array, later: Array) -> None:
        """A state that is `first` in a fresh session, and `later` ever after."""
        new = self._new_name(f"{layout.name}.later")
        self._add_state(layout.name, layout.name, new, layout, first, role=spec_pb2.STATE_ROLE_CUSTOM)
        shape = self._before.add("Shape", layout.name)
        self._before.add("Expand", self._before.constant(later[np.newaxis]), shape, output=new)
        self._place(layout.name, layout.name, layout, [0] if layout.batch_axis is None else [])

    def _add_input(self, layout: Layout) -> None:
        self._spec.inputs.append(_public(layout))
        self._inputs.append(_info(layout.name, layout.dtype, ["batch", "time", *layout.shape]))
        value = layout.name
        if layout.time_axis is None:
            value = self._before.add("Squeeze", value, axes_of(self._before, [1]))
        if layout.window is not None:
            value = self._add_window(layout, value)
        self._place(layout.name, value, layout, [0] if layout.batch_axis is None else [])

    def _add_window(self, layout: Layout, value: str) -> str:
        """Puts what a session kept of an input in front of its new time step; keeps the newest of both."""
        kept, shape, axis = self._new_name(f"{layout.name}.window"), layout.window_shape, layout.window_axis
        new = self._new_name(f"{kept}.new")
        window = Layout(kept, layout.dtype, 0, None, shape)
        self._add_state(kept, kept, new, window, np.zeros(shape, layout.dtype), role=spec_pb2.STATE_ROLE_CONTEXT)
        seen = self._before.add("Concat", kept, value, axis=axis)
        bounds = [self._before.constant(np.array([bound])) for bound in (-shape[axis - 1], _END, axis)]
        self._before.add("Slice", seen, *bounds, output=new)
        return seen

    def _add_output(self, layout: Layout) -> None:
        self._spec.outputs.append(_public(layout))
        self._outputs.append(_info(layout.name, layout.dtype, ["batch", "time", *layout.shape]))
        missing = [public for public, axis in enumerate((layout.batch_axis, layout.time_axis)) if axis is None]
        self._take_out(layout.name, layout.name, layout, missing)

    def _add_constant(self, constant: Constant) -> None:
        value, axis, nodes = self._fitted.constants[constant.name], constant.batch_axis, self._before
        if axis is None or self._one_row:
            self._weights.append(numpy_helper.from_array(value, constant.name))
            return
        first, last = (nodes.constant(np.array([bound])) for bound in (0, 1))
        rows = nodes.add("Slice", nodes.add("Shape", self._fitted.inputs[0].name), first, last)
        ones = [nodes.constant(np.ones(count, np.int64)) for count in (axis, value.ndim - 1 - axis)]
        shape = nodes.add("Concat", ones[0], rows, ones[1], axis=0)
        nodes.add("Expand", nodes.constant(value), shape, output=constant.name)

    def _add_state(
        self,
        name: str,
        old: str,
        new: str,
        layout: Layout,
        initial: Array,
        *,
        role: spec_pb2.StateRole.ValueType,
        layer: str = "",
    ) -> None:
        data = initial.tobytes()
        self._spec.states.add(
            name=name,
            input_name=old,
            output_name=new,
            dtype=to_data_type(layout.dtype),
            shape=layout.shape,
            initial=data if any(data) else b"",
            role=role,
            layer=layer,
        )
        self._inputs.append(_info(old, layout.dtype, ["batch", *layout.shape]))
        self._outputs.append(_info(new, layout.dtype, ["batch", *layout.shape]))

    def _place(self, name: str, value: str, layout: Layout, squeezed: Sequence[int]) -> None:
        """Has the file's graph read, as `name`, the rows of `value` with their axes where it wants them."""
        nodes, order = self._before, layout.order
        if squeezed:
            value = nodes.add("Squeeze", value, axes_of(nodes, squeezed))
        if order != sorted(order):
            value = nodes.add("Transpose", value, perm=[order.index(axis) for axis in range(len(order))])
        if value != name:
            self._renamed[name] = value

    def _take_out(self, name: str, public: str, layout: Layout, missing: Sequence[int]) -> None:
        """Makes `public` of what the file's graph gives as `name`: rows first, with the axes that are missing."""
        nodes, moved = self._after, layout.order != sorted(layout.order)
        if not moved and not missing and public == name and name not in self._renamed:
            return
        if name not in self._renamed:
            self._renamed[name] = self._new_name(f"{name}.own")
        value = self._renamed[name]
        if moved:
            value = nodes.add("Transpose", value, perm=layout.order, output="" if missing else public)
        if missing:
            nodes.add("Unsqueeze", value, axes_of(nodes, missing), output=public)
        elif not moved:
            nodes.add("Identity", value, output=public)

    def _new_name(self, wanted: str) -> str:
        """A name that the graph has not, and that no name of the graph goes on from."""
        name, number = wanted, 2
        while any(taken == name or taken.startswith(f"{name}.") for taken in self._taken):
            name, number = f"{wanted}{number}", number + 1
        self._taken.add(name)
        return name


def _public(layout: Layout) -> spec_pb2.TensorSpec:
    """An input or output as clients know it."""
    return spec_pb2.TensorSpec(
        name=layout.name,
        dtype=to_data_type(layout.dtype),
        shape=layout.shape,
        has_time=True,
        time_added=layout.time_axis is None,
    )


def _info(name: str, dtype: np.dtype[np.generic], shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
