"""State in forward's own signature, however it is packed: it becomes session state and leaves the user's view."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from conveyor_export.capture import CaptureError, capture
from conveyor_proto.spec import initial_row
from conveyor_proto.v1 import spec_pb2
from torch import nn


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


class TensorState(nn.Module):
    """A stacked `[layers, batch, hidden]` tensor."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 5, 2, batch_first=True)

    def forward(self, x, h):
        return self.gru(x, h)


class BatchFirstState(TensorState):
    def forward(self, x, h):
        y, h = self.gru(x, h.transpose(0, 1).contiguous())
        return y, h.transpose(0, 1)


class TupleState(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x, state=None):
        return self.lstm(x, state)


class NamedState(TupleState):
    def forward(self, x, state):
        y, (h, c) = self.lstm(x, (state.h, state.c))
        return y, State(h, c)


class DictState(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.rnn = nn.LSTM(4, 5, batch_first=True), nn.RNN(5, 3, batch_first=True)

    def forward(self, x, state):
        y, lstm = self.lstm(x, state["lstm"])
        y, rnn = self.rnn(y, state["rnn"])
        return {"y": y, "state": {"lstm": lstm, "rnn": rnn}}


def zeros(*shape):
    return torch.zeros(shape)


CASES = {
    "stacked tensor": (TensorState, zeros(2, 2, 5), ["gru.0.hidden", "gru.1.hidden"], "output"),
    "batch first": (BatchFirstState, zeros(2, 2, 5), ["gru.0.hidden", "gru.1.hidden"], "output"),
    "tuple": (TupleState, (zeros(1, 2, 5), zeros(1, 2, 5)), ["lstm.0.hidden", "lstm.0.cell"], "output"),
    "named tuple": (NamedState, State(zeros(1, 2, 5), zeros(1, 2, 5)), ["lstm.0.hidden", "lstm.0.cell"], "output"),
    "dict": (
        DictState,
        {"lstm": (zeros(1, 2, 5), zeros(1, 2, 5)), "rnn": zeros(1, 2, 3)},
        ["lstm.0.hidden", "lstm.0.cell", "rnn.0.hidden"],
        "y",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_state_in_the_signature(case, check_streams):
    make, state, names, output = CASES[case]
    model = capture(make(), (torch.randn(2, 6, 4), state))
    check_streams(model)
    assert [item.name for item in model.spec.inputs] == ["x"]
    assert [item.name for item in model.spec.outputs] == [output]
    assert [item.name for item in model.spec.states] == names
    assert model.spec.provenance.form == "sequence"


def test_an_example_of_one_row_one_step_and_a_list_of_states(check_streams):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.LSTM(4, 4, batch_first=True) for _ in range(2))

        def forward(self, x, states):
            new = []
            for layer, old in zip(self.layers, states, strict=True):
                y, state = layer(x, old)
                x = x + y
                new.append(state)
            return x, new

    model = capture(Residual(), {"x": torch.randn(1, 1, 4), "states": [(zeros(1, 1, 4), zeros(1, 1, 4))] * 2})
    check_streams(model)
    names = [f"layers.{at}.0.{role}" for at in range(2) for role in ("hidden", "cell")]
    assert [state.name for state in model.spec.states] == names
    assert [item.name for item in model.spec.inputs] == ["x"]


def test_state_left_out_where_it_defaults_to_none(check_streams):
    model = capture(TupleState(), torch.randn(2, 6, 4))
    check_streams(model)
    assert [item.name for item in model.spec.states] == ["lstm.0.hidden", "lstm.0.cell"]


def test_the_examples_state_is_the_fresh_row(check_streams):
    rows = torch.randn(2, 1, 5)
    model = capture(TensorState(), (torch.randn(3, 6, 4), rows.expand(-1, 3, -1).contiguous()))
    check_streams(model)
    for state, row in zip(model.spec.states, rows, strict=True):
        np.testing.assert_array_equal(initial_row(state), row[0].numpy())


def test_random_example_states_are_left_out_where_they_may_be():
    state = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    model = capture(TupleState(), (torch.randn(2, 6, 4), state))
    assert [item.initial for item in model.spec.states] == [b"", b""]


def test_random_example_states_are_refused_where_they_are_needed():
    with pytest.raises(CaptureError, match=r"rows of state 'h' in the example inputs differ.*usually zeros"):
        capture(TensorState(), (torch.randn(2, 6, 4), torch.randn(2, 2, 5)))


def test_state_of_the_modules_own_making(check_streams):
    class Handmade(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(9, 5)

        def forward(self, x, h):
            answers = []
            for step in range(x.shape[1]):
                h = torch.tanh(self.cell(torch.cat([x[:, step], h], -1)))
                answers.append(h)
            return torch.stack(answers, 1), h

    model = capture(Handmade(), (torch.randn(2, 6, 4), torch.full((2, 5), 0.5)))
    check_streams(model)
    assert [(item.name, item.role) for item in model.spec.states] == [("h", spec_pb2.STATE_ROLE_CUSTOM)]
    np.testing.assert_array_equal(initial_row(model.spec.states[0]), np.full(5, 0.5, np.float32))
    assert [item.name for item in model.spec.outputs] == ["output"]
    assert model.spec.provenance.form == "scan"


def test_a_layers_state_that_the_module_changes_before_returning_it(check_streams):
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 2)

        def forward(self, x, h):
            h = self.cell(x, h)
            return self.head(h), 0.5 * h

    model = capture(Squashed(), (torch.randn(2, 4), torch.zeros(2, 5)))
    check_streams(model)
    assert [(item.name, item.role) for item in model.spec.states] == [("h", spec_pb2.STATE_ROLE_CUSTOM)]
