"""Modules as people write them around recurrent layers."""

from typing import NamedTuple

import torch
from conveyor_export.capture import capture
from torch import nn


def outputs_of(model):
    return [(item.name, list(item.shape), item.has_time) for item in model.spec.outputs]


def test_mixed_layers_with_embedding_norm_dropout_and_heads(check_streams):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.lstm = nn.LSTM(4, 6, 2, dropout=0.3)
            self.gru = nn.GRU(6, 5)
            self.norm = nn.LayerNorm(5)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(5, 3)

        def forward(self, tokens):
            y, _ = self.lstm(self.embed(tokens))
            y, _ = self.gru(y)
            y = self.drop(self.norm(y))
            return {"logits": self.head(y), "scores": {"log": torch.log_softmax(self.head(y), -1)}}

    model = capture(Mixed(), torch.randint(0, 9, (5, 2)))
    check_streams(model)
    assert [(item.name, list(item.shape)) for item in model.spec.inputs] == [("tokens", [])]
    assert outputs_of(model) == [("logits", [3], True), ("scores.log", [3], True)]
    assert [layer.path for layer in model.spec.layers] == ["lstm.0", "lstm.1", "gru.0"]


def test_a_module_called_twice_has_a_state_for_each_call(check_streams):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            y, _ = self.lstm(x)
            return self.lstm(y + x)[0]

    model = capture(Twice(), torch.randn(2, 5, 4))
    check_streams(model)
    names = ["lstm.0.hidden", "lstm.0.cell", "lstm.0.hidden#2", "lstm.0.cell#2"]
    assert [state.name for state in model.spec.states] == names
    assert [state.layer for state in model.spec.states] == ["lstm.0", "lstm.0", "lstm.0#2", "lstm.0#2"]
    assert len([item for item in model.proto.graph.initializer if item.name.startswith("lstm")]) == 3


def test_tied_weights(check_streams):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.first, self.second = nn.GRU(4, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
            for name, parameter in self.first.named_parameters():
                setattr(self.second, name, parameter)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.second(self.first(self.embed(tokens))[0])[0])

    model = capture(Tied(), torch.randint(0, 9, (2, 5)))
    check_streams(model)
    assert len([item for item in model.proto.graph.initializer if item.name.startswith("first.0")]) == 3
    assert not [item for item in model.proto.graph.initializer if item.name.startswith("second")]


def test_tuple_and_named_outputs_get_their_names(check_streams):
    class Out(NamedTuple):
        answers: torch.Tensor
        last: torch.Tensor

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 5, batch_first=True)

        def forward(self, x):
            y, h = self.gru(x)
            return Out(y, h[-1])

    class Plain(Named):
        def forward(self, x):
            return tuple(super().forward(x))

    model = capture(Named(), torch.randn(2, 5, 4))
    check_streams(model)
    assert outputs_of(model) == [("answers", [5], True), ("last", [5], False)]
    example = torch.randn(2, 5, 4)
    assert [item.name for item in capture(Plain(), example).spec.outputs] == ["output_0", "output_1"]

    class Nested(Named):
        def forward(self, x):
            y, h = self.gru(x)
            return {"logits": y}, {"last": h[-1]}

    class Twice(Named):
        def forward(self, x):
            y, h = self.gru(x)
            return {"y": y}, {"y": h[-1]}

    assert [item.name for item in capture(Nested(), example).spec.outputs] == ["logits", "last"]
    assert [item.name for item in capture(Twice(), example).spec.outputs] == ["output_0_y", "output_1_y"]
    renamed = capture(Plain(), example, name="tiny", input_names=["signal"], output_names=["y", "h"])
    assert renamed.spec.name == "tiny"
    assert [item.name for item in renamed.spec.inputs] == ["signal"]
    assert [item.name for item in renamed.spec.outputs] == ["y", "h"]
    assert set(renamed.example) == {"signal"}


def test_inputs_without_time_and_constants(check_streams):
    class Speaker(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(6, 5)

        def forward(self, x, speaker, scale=1.5):
            both = torch.cat([x, speaker[None].expand(x.shape[0], -1, -1)], -1)
            y, h = self.gru(both)
            return y * scale, h.squeeze(0), y[-1]

    model = capture(Speaker(), (torch.randn(6, 2, 4), torch.randn(2, 2)))
    check_streams(model)
    assert [(item.name, item.has_time) for item in model.spec.inputs] == [("x", True), ("speaker", False)]
    assert outputs_of(model) == [("output_0", [5], True), ("output_1", [5], False), ("output_2", [5], False)]


def test_batch_and_time_merged_into_one_axis_come_apart_again(check_streams):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0].reshape(-1, 5))

    model = capture(Flat(), torch.randn(2, 5, 4))
    check_streams(model)
    assert outputs_of(model) == [("output", [3], True)]
