"""Modules that take time step by step: cells in Python loops, and modules of a single step."""

import pytest
import torch
from conveyor_export.capture import capture
from torch import nn

CELLS = {
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda i, h: nn.RNNCell(i, h, nonlinearity="relu"),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}


class Loop(nn.Module):
    """Two cells in a loop over time, state from zeros."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = CELLS[kind](4, 5), nn.GRUCell(5, 3)
        self.head = nn.Linear(3, 2)
        self.lstm = kind == "lstm"

    def forward(self, x):
        batch, time, _ = x.shape
        state = (x.new_zeros(batch, 5), x.new_zeros(batch, 5)) if self.lstm else x.new_zeros(batch, 5)
        top = x.new_zeros(batch, 3)
        answers = []
        for step in range(time):
            state = self.first(x[:, step], state)
            top = self.second(state[0] if self.lstm else state, top)
            answers.append(self.head(top))
        return {"y": torch.stack(answers, 1), "last": top}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop(kind, check_streams):
    model = capture(Loop(kind), torch.randn(2, 5, 4))
    check_streams(model)
    spec = model.spec
    cells = ["first.0.hidden", "first.0.cell"] if kind == "lstm" else ["first.0.hidden"]
    assert [state.name for state in spec.states] == [*cells, "second.0.hidden"]
    assert [(item.name, item.has_time) for item in spec.outputs] == [("y", True), ("last", False)]
    assert spec.provenance.form == "scan"
    assert spec.operations["Scan"] == 1
    assert [layer.node for layer in spec.layers] == ["", ""]


def test_time_first_loop_over_a_learned_state(check_streams):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(4, 5)
            self.h0 = nn.Parameter(torch.randn(5))

        def forward(self, x):
            h = self.h0.expand(x.shape[1], -1)
            answers = []
            for x_t in x:
                h = self.cell(x_t, h)
                answers.append(h)
            return torch.stack(answers)

    check_streams(capture(TimeFirst(), torch.randn(5, 2, 4)))


def test_a_sequence_layer_called_in_a_loop(check_streams):
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, batch_first=True)

        def forward(self, x):
            state, answers = None, []
            for step in range(x.shape[1]):
                y, state = self.lstm(x[:, step : step + 1], state)
                answers.append(y)
            return torch.cat(answers, 1)

    check_streams(capture(Looped(), torch.randn(2, 5, 4)))


def test_a_sequence_layer_before_a_loop(check_streams):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.cell = nn.LSTM(4, 5, batch_first=True), nn.GRUCell(5, 3)

        def forward(self, x):
            y, _ = self.lstm(x)
            h, answers = x.new_zeros(x.shape[0], 3), []
            for step in y.unbind(1):
                h = self.cell(step, h)
                answers.append(h)
            return torch.stack(answers, 1), y[:, -1]

    check_streams(capture(Both(), torch.randn(2, 5, 4)))


def test_a_loop_that_changes_the_state_between_its_calls(check_streams):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.norm = nn.GRUCell(4, 5), nn.LayerNorm(5)

        def forward(self, x):
            h, answers = x.new_zeros(x.shape[0], 5), []
            for step in range(x.shape[1]):
                h = self.norm(self.cell(x[:, step], h))
                answers.append(h)
            return torch.stack(answers, 1)

    check_streams(capture(Normed(), torch.randn(2, 5, 4)))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_a_model_of_one_step(kind, check_streams):
    state = torch.zeros(2, 5)
    model = capture(CELLS[kind](4, 5), (torch.randn(2, 4), (state, state) if kind == "lstm" else state))
    check_streams(model)
    assert [(item.name, list(item.shape), item.has_time) for item in model.spec.inputs] == [("input", [4], True)]
    assert [(item.name, list(item.shape), item.has_time) for item in model.spec.outputs] == [("output", [5], True)]
    assert len(model.spec.states) == (2 if kind == "lstm" else 1)


def test_a_module_of_one_step_on_tokens(check_streams):
    class OneToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 5, 2, batch_first=True)

        def forward(self, token, h, c):
            y, (h, c) = self.lstm(self.embed(token).unsqueeze(1), (h, c))
            return y.squeeze(1), h, c

    model = capture(OneToken(), (torch.randint(0, 9, (2,)), torch.zeros(2, 2, 5), torch.zeros(2, 2, 5)))
    check_streams(model)
    assert [(item.name, list(item.shape), item.has_time) for item in model.spec.inputs] == [("token", [], True)]
    assert [state.name for state in model.spec.states] == [
        "lstm.0.hidden",
        "lstm.0.cell",
        "lstm.1.hidden",
        "lstm.1.cell",
    ]


def test_a_module_of_one_step_with_cells_over_a_stacked_state(check_streams):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([nn.GRUCell(4, 5), nn.GRUCell(5, 5)])

        def forward(self, x, h):
            new = []
            for index, cell in enumerate(self.cells):
                x = cell(x, h[index])
                new.append(x)
            return x, torch.stack(new)

    model = capture(Stacked(), (torch.randn(2, 4), torch.zeros(2, 2, 5)))
    check_streams(model)
    assert [state.name for state in model.spec.states] == ["cells.0.0.hidden", "cells.1.0.hidden"]
