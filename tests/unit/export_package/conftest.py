"""Step models made by hand: one recurrent ONNX operator and a linear head, with the torch module they come from.

They need no exporter, so that the judge is tested apart from what it judges.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from conveyor_export.step_model import Reference, StepModel
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from onnx import TensorProto, helper, numpy_helper
from torch import nn

FEATURES, HIDDEN, CLASSES = 3, 5, 2

# Kind -> (ONNX operator, torch gate order seen from ONNX, spec kind).
KINDS = {
    "rnn_tanh": ("RNN", [0], spec_pb2.LAYER_KIND_RNN_TANH),
    "rnn_relu": ("RNN", [0], spec_pb2.LAYER_KIND_RNN_RELU),
    "lstm": ("LSTM", [0, 3, 1, 2], spec_pb2.LAYER_KIND_LSTM),
    "gru": ("GRU", [1, 0, 2], spec_pb2.LAYER_KIND_GRU),
}


class Tagger(nn.Module):
    """One recurrent layer and a head, `[batch, time, 3]` -> `[batch, time, 2]`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        makers = {
            "rnn_tanh": lambda: nn.RNN(FEATURES, HIDDEN, batch_first=True),
            "rnn_relu": lambda: nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", batch_first=True),
            "lstm": lambda: nn.LSTM(FEATURES, HIDDEN, batch_first=True),
            "gru": lambda: nn.GRU(FEATURES, HIDDEN, batch_first=True),
        }
        self.rnn = makers[kind]()
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


@dataclass(frozen=True)
class Handmade:
    """A step model and the module it was made of."""

    model: StepModel
    module: Tagger

    def with_reference(self, change: Callable[[Mapping[str, np.ndarray], Reference], Reference]) -> StepModel:
        """The same graph beside a module that does something more."""
        original = self.model.reference
        return replace(self.model, reference=lambda inputs: change(inputs, original(inputs)))

    def with_graph(self, change: Callable[[onnx.ModelProto], None]) -> StepModel:
        """The same module beside a changed graph."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        change(proto)
        return replace(self.model, proto=proto)


@pytest.fixture
def handmade() -> Callable[[str], Handmade]:
    torch.set_num_threads(1)

    def make(kind: str) -> Handmade:
        torch.manual_seed(7)
        module = Tagger(kind).eval()
        return Handmade(_step_model(kind, module), module)

    return make


@pytest.fixture(params=KINDS)
def any_kind(request: pytest.FixtureRequest, handmade: Callable[[str], Handmade]) -> Handmade:
    """One hand-made step model for each of RNN tanh, RNN relu, LSTM and GRU."""
    return handmade(request.param)


def _step_model(kind: str, module: Tagger) -> StepModel:
    operator, order, layer_kind = KINDS[kind]
    cell = kind == "lstm"
    names = ["hidden", *(["cell"] if cell else [])]
    states = [
        spec_pb2.StateSpec(
            name=f"rnn.0.{name}",
            input_name=f"{name}_in",
            output_name=f"{name}_out",
            dtype=tensor_pb2.DATA_TYPE_FLOAT32,
            shape=[HIDDEN],
            role=spec_pb2.STATE_ROLE_CELL if name == "cell" else spec_pb2.STATE_ROLE_HIDDEN,
            layer="rnn.0",
        )
        for name in names
    ]
    spec = spec_pb2.ModelSpec(
        spec_version=1,
        name="tagger",
        inputs=[
            spec_pb2.TensorSpec(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[FEATURES], has_time=True),
        ],
        outputs=[
            spec_pb2.TensorSpec(name="logits", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[CLASSES], has_time=True),
        ],
        states=states,
        lengths_input="lengths",
        layers=[
            spec_pb2.LayerSpec(path="rnn.0", kind=layer_kind, input_size=FEATURES, hidden_size=HIDDEN, node="recurrent")
        ],
        provenance=spec_pb2.Provenance(
            conveyor_version="0.1.0", torch_version=torch.__version__, opset=20, ir_version=10, module="tests.Tagger"
        ),
        state_bytes=4 * HIDDEN * len(states),
    )
    proto = _graph(operator, order, kind, module, names)
    for node in proto.graph.node:
        spec.operations[node.op_type] += 1

    def reference(inputs: Mapping[str, np.ndarray]) -> Reference:
        with torch.no_grad():
            y, final = module.rnn(torch.from_numpy(inputs["x"]))
            finals = final if cell else (final,)
            logits = module.head(y).numpy()
        return Reference({"logits": logits}, {s.name: f[0].numpy() for s, f in zip(states, finals, strict=True)})

    example = {"x": np.random.default_rng(1).standard_normal((2, 9, FEATURES)).astype(np.float32)}
    return StepModel(proto, spec, reference, example)


def _graph(operator: str, order: list[int], kind: str, module: Tagger, states: list[str]) -> onnx.ModelProto:
    def gates(tensor: torch.Tensor) -> np.ndarray:
        return np.concatenate([np.split(tensor.detach().numpy(), len(order))[index] for index in order])

    rnn, head = module.rnn, module.head
    bias = np.concatenate([gates(rnn.bias_ih_l0), gates(rnn.bias_hh_l0)])
    weights = {
        "W": gates(rnn.weight_ih_l0)[None],
        "R": gates(rnn.weight_hh_l0)[None],
        "B": bias[None],
        "head_w": head.weight.detach().numpy().T.copy(),
        "head_b": head.bias.detach().numpy(),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "zero_length": np.array(0, np.int32),
    }
    options: dict[str, object] = {"hidden_size": HIDDEN}
    if kind == "gru":
        options["linear_before_reset"] = 1
    if kind == "rnn_relu":
        options["activations"] = ["Relu"]
    node, f32 = helper.make_node, TensorProto.FLOAT
    nodes = [
        node("Transpose", ["x"], ["x_time_first"], perm=[1, 0, 2]),
        *(node("Unsqueeze", [f"{state}_in", "zero"], [f"{state}_0"]) for state in states),
        node(
            operator,
            ["x_time_first", "W", "R", "B", "lengths", *(f"{state}_0" for state in states)],
            ["y4", *(f"{state}_1" for state in states)],
            name="recurrent",
            **options,
        ),
        node("Squeeze", ["y4", "one"], ["y_time_first"]),
        node("Transpose", ["y_time_first"], ["y"], perm=[1, 0, 2]),
        node("MatMul", ["y", "head_w"], ["y_head"]),
        node("Add", ["y_head", "head_b"], ["logits"], name="head"),
        # A row of length 0 comes out of the operator as zeros: it keeps its state instead.
        node("Greater", ["lengths", "zero_length"], ["moved"]),
        node("Unsqueeze", ["moved", "one"], ["moved_column"]),
    ]
    for state in states:
        nodes.append(node("Squeeze", [f"{state}_1", "zero"], [f"{state}_2"]))
        nodes.append(
            node("Where", ["moved_column", f"{state}_2", f"{state}_in"], [f"{state}_out"], name=f"keep_{state}")
        )
    graph = helper.make_graph(
        nodes,
        "tagger",
        [
            helper.make_tensor_value_info("x", f32, ["batch", "time", FEATURES]),
            *(helper.make_tensor_value_info(f"{state}_in", f32, ["batch", HIDDEN]) for state in states),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("logits", f32, ["batch", "time", CLASSES]),
            *(helper.make_tensor_value_info(f"{state}_out", f32, ["batch", HIDDEN]) for state in states),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
