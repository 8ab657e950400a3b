"""RNN (tanh, relu), LSTM and GRU as torch has them: every argument of the layers that changes the graph."""

import numpy as np
import pytest
import torch
from conveyor_export.capture import capture
from conveyor_proto.spec import initial_row
from conveyor_proto.v1 import spec_pb2
from torch import nn

KINDS = {
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}, spec_pb2.LAYER_KIND_RNN_TANH, "RNN", ("hidden",)),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}, spec_pb2.LAYER_KIND_RNN_RELU, "RNN", ("hidden",)),
    "lstm": (nn.LSTM, {}, spec_pb2.LAYER_KIND_LSTM, "LSTM", ("hidden", "cell")),
    "gru": (nn.GRU, {}, spec_pb2.LAYER_KIND_GRU, "GRU", ("hidden",)),
}


class Wrapped(nn.Module):
    def __init__(self, kind, **kwargs):
        super().__init__()
        make, own, *_ = KINDS[kind]
        self.rnn = make(4, 6, **own, **kwargs)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_operator_for_each_layer(kind, layers, check_streams):
    *_, layer_kind, operator, roles = KINDS[kind]
    model = capture(
        Wrapped(kind, num_layers=layers, batch_first=True, dropout=0.5 if layers > 1 else 0), torch.randn(2, 5, 4)
    )
    check_streams(model)
    spec = model.spec
    assert spec.operations[operator] == layers
    assert spec.provenance.form == "sequence"
    assert [state.name for state in spec.states] == [f"rnn.{at}.{role}" for at in range(layers) for role in roles]
    assert [layer.kind for layer in spec.layers] == [layer_kind] * layers
    assert [(layer.input_size, layer.hidden_size) for layer in spec.layers] == [(4, 6)] + [(6, 6)] * (layers - 1)
    nodes = {node.name: node for node in model.proto.graph.node}
    for layer in spec.layers:
        node = nodes[layer.node]
        assert node.op_type == operator
        assert "clip" not in {attribute.name for attribute in node.attribute}


@pytest.mark.parametrize("kind", KINDS)
def test_time_first_modules_have_the_same_public_layout(kind, check_streams):
    model = capture(Wrapped(kind, bias=False), {"x": torch.randn(5, 2, 4)})
    check_streams(model)
    assert [(item.name, list(item.shape), item.has_time) for item in model.spec.inputs] == [("x", [4], True)]
    assert model.example["x"].shape == (2, 5, 4)


def test_a_bare_layer_is_a_model(check_streams):
    model = capture(nn.LSTM(4, 6, batch_first=True), torch.randn(2, 5, 4))
    check_streams(model)
    assert [item.name for item in model.spec.outputs] == ["output"]
    assert [state.name for state in model.spec.states] == ["lstm.0.hidden", "lstm.0.cell"]


def test_a_learned_initial_state_is_the_fresh_row(check_streams):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 6, 2, batch_first=True)
            self.h0 = nn.Parameter(torch.randn(2, 1, 6))

        def forward(self, x):
            return self.gru(x, self.h0.expand(-1, x.shape[0], -1).contiguous())[0]

    module = Learned()
    model = capture(module, torch.randn(2, 5, 4))
    check_streams(model)
    for state, row in zip(model.spec.states, module.h0, strict=True):
        np.testing.assert_array_equal(initial_row(state), row[0].detach().numpy())


@pytest.mark.parametrize("zeros", ["none", "inside"])
def test_a_zero_initial_state_takes_no_bytes(zeros, check_streams):
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x):
            start = torch.zeros(1, x.shape[0], 6)
            return self.lstm(x, None if zeros == "none" else (start, start))[0]

    model = capture(Zeros(), torch.zeros(1, 5, 4))
    check_streams(model)
    assert [state.initial for state in model.spec.states] == [b"", b""]
    assert model.spec.state_bytes == 2 * 6 * 4


@pytest.mark.parametrize(("layers", "biases"), [(1, True), (2, False)])
def test_a_projected_lstm_runs_in_a_scan(layers, biases, check_streams):
    module = nn.LSTM(4, 6, layers, proj_size=3, bias=biases, batch_first=True)
    model = capture(module, torch.randn(2, 5, 4))
    check_streams(model)
    assert [list(state.shape) for state in model.spec.states] == [[3], [6]] * layers
    assert [(layer.proj_size, layer.node) for layer in model.spec.layers] == [(3, "")] * layers
    assert model.spec.operations["Scan"] == layers
    assert model.spec.provenance.form == "scan"


def test_weights_are_constants_and_never_inputs():
    model = capture(Wrapped("gru", batch_first=True), torch.randn(2, 5, 4))
    graph = model.proto.graph
    names = {item.name for item in graph.initializer}
    assert {"rnn.0.W", "rnn.0.R", "rnn.0.B"} <= names
    assert names.isdisjoint(value.name for value in graph.input)
    assert [value.name for value in graph.input] == ["x", "lengths", "rnn.0.hidden"]
    assert [value.name for value in graph.output] == ["output", "rnn.0.hidden.next"]
    assert model.proto.ir_version == 10
    assert [(item.domain, item.version) for item in model.proto.opset_import] == [("", 20)]
