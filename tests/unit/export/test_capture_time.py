"""What forward() may do along time: look back by convolution, shift, pack by length, take the last step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conveyor_export.capture import capture
from conveyor_proto.v1 import spec_pb2
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def contexts_of(model):
    states = [state for state in model.spec.states if state.role == spec_pb2.STATE_ROLE_CONTEXT]
    return [(state.name, list(state.shape)) for state in states]


def test_left_padding_before_a_convolution(check_streams):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gru = nn.Conv1d(4, 6, 3, dilation=2), nn.GRU(6, 5, batch_first=True)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.norm(self.conv(F.pad(x.transpose(1, 2), (4, 0))))
            return self.gru(torch.relu(y).transpose(1, 2))[0]

    model = capture(Padded(), torch.randn(2, 6, 4))
    check_streams(model)
    assert contexts_of(model) == [("padded.context", [4, 4])]
    assert [state.name for state in model.spec.states] == ["padded.context", "gru.0.hidden"]


def test_padding_on_both_sides_and_a_chomp(check_streams):
    class Chomp(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv1d(4, 4, 3, padding=2)
            self.second = nn.Conv1d(4, 4, 2, padding=3, dilation=3)
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x):
            y = x.transpose(1, 2)
            y = y + torch.relu(self.first(y))[:, :, :-2]
            y = y + torch.relu(self.second(y)[..., : y.shape[-1]])
            return self.lstm(y.transpose(1, 2))[0]

    model = capture(Chomp(), torch.randn(2, 6, 4))
    check_streams(model)
    assert contexts_of(model) == [("first.context", [4, 2]), ("second.context", [4, 3])]


def test_causal_convolutions_alone_have_a_state_too(check_streams):
    class Tcn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 2, 4)

        def forward(self, x):
            return self.conv(F.pad(x, (3, 0)))

    model = capture(Tcn(), torch.randn(2, 3, 6))
    check_streams(model)
    assert contexts_of(model) == [("tcn.context", [3, 3])]
    assert model.example["x"].shape == (2, 6, 3)


def test_a_two_dimensional_convolution_causal_in_time(check_streams):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gru = nn.Conv2d(1, 2, 3), nn.GRU(8, 5, batch_first=True)

        def forward(self, x):
            y = self.conv(F.pad(x.unsqueeze(1), (1, 1, 2, 0)))
            return self.gru(y.permute(0, 2, 1, 3).flatten(2))[0]

    model = capture(Spectral(), torch.randn(2, 6, 4))
    check_streams(model)
    assert contexts_of(model) == [("spectral.context", [1, 2, 4])]


def test_the_sequence_shifted_by_one_step(check_streams):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(8, 5, batch_first=True)

        def forward(self, x):
            before = torch.cat([torch.full((x.shape[0], 1, 4), 0.5), x[:, :-1]], 1)
            padded = F.pad(x, (0, 0, 1, 0))[:, :-1]
            return self.rnn(torch.cat([x - before, padded], -1))[0]

    model = capture(Shifted(), torch.randn(2, 6, 4))
    check_streams(model)
    assert contexts_of(model) == [("shifted.context", [1, 4]), ("shifted.context#2", [1, 4])]
    half, zero = (state.initial for state in model.spec.states[:2])
    np.testing.assert_array_equal(np.frombuffer(half, np.float32), np.full(4, 0.5))
    assert zero == b""


def test_differences_from_the_step_before(check_streams):
    class Differences(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x):
            y, _ = self.gru(x - torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1), x.new_zeros(1, x.shape[0], 5))
            none = torch.zeros_like(y)
            return self.head(y - torch.cat([none[:, :1], y[:, :-1]], 1))

    model = capture(Differences(), torch.randn(2, 6, 4))
    check_streams(model)
    names = ["differences.context", "gru.0.hidden", "differences.context#2"]
    assert [state.name for state in model.spec.states] == names


def test_padded_tokens(check_streams):
    class Trigrams(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 5, 3)
            self.gru = nn.GRU(5, 5, batch_first=True)

        def forward(self, tokens):
            embedded = self.embed(F.pad(tokens, (2, 0), value=7))
            return self.gru(self.conv(embedded.transpose(1, 2)).transpose(1, 2))[0]

    check_streams(capture(Trigrams(), torch.randint(0, 9, (2, 6))))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_last_step_is_each_rows_own(kind, check_streams):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(4, 5, 2, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            y, state = self.rnn(x)
            h = state[0] if kind is nn.LSTM else state
            return {"last": self.head(y[:, -1]), "kept": self.head(y[:, -1:, :]).squeeze(1), "hidden": self.head(h[-1])}

    model = capture(Last(), torch.randn(2, 5, 4))
    check_streams(model)
    assert [(item.name, list(item.shape), item.has_time) for item in model.spec.outputs] == [
        ("last", [3], False),
        ("kept", [3], False),
        ("hidden", [3], False),
    ]


@pytest.mark.parametrize(("kind", "batch_first"), [(nn.RNN, True), (nn.LSTM, False), (nn.LSTM, True), (nn.GRU, True)])
def test_packed_sequences(kind, batch_first, check_streams):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(4, 5, batch_first=batch_first), nn.Linear(5, 3)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=batch_first, enforce_sorted=not batch_first)
            y, state = self.rnn(packed)
            y, sizes = pad_packed_sequence(y, batch_first=batch_first)
            h = state[0] if kind is nn.LSTM else state
            rows = torch.arange(sizes.shape[0])
            last = y[rows, sizes - 1] if batch_first else y[sizes - 1, rows]
            mask = (torch.arange(y.shape[1])[None] < sizes[:, None])[..., None] if batch_first else 1.0
            return {"y": self.head(y) * mask, "last": last, "hidden": h[-1]}

    x = torch.randn(3, 6, 4) if batch_first else torch.randn(6, 3, 4)
    lengths = torch.tensor([3, 6, 5]) if batch_first else torch.tensor([6, 5, 3])
    model = capture(Packed(), (x, lengths))
    check_streams(model)
    assert [item.name for item in model.spec.inputs] == ["x"]
    assert model.spec.lengths_input == "lengths"
    assert [(item.name, item.has_time) for item in model.spec.outputs] == [
        ("y", True),
        ("last", False),
        ("hidden", False),
    ]


def test_lengths_as_a_list(check_streams):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gru = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True)

        def forward(self, tokens, sizes):
            packed = pack_padded_sequence(self.embed(tokens), sizes, batch_first=True, enforce_sorted=False)
            return self.gru(packed)[1][-1]

    model = capture(Listed(), (torch.zeros(2, 6, dtype=torch.int64), [4, 6]))
    check_streams(model)
    assert [item.name for item in model.spec.inputs] == ["tokens"]
